"""A hub on this machine for huggingface_hub's own client: models by name and revision; which files it was asked for."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

_INFO = re.compile(r"/api/models/([^/]+/[^/]+)/revision/([^/]+)$")
_TREE = re.compile(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)$")
_FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)$")


def commit_of(folder: Path) -> str:
    """A commit's name for the content of a folder."""
    digest = hashlib.sha1()
    for path in sorted(folder.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


@dataclass
class Hub:
    """Folders by name and by branch or tag; `asked` are the files whose content was sent, in order."""

    models: dict[str, dict[str, Path]]
    home: Path
    address: str = ""
    asked: list[str] = field(default_factory=list)

    def folder(self, name: str, revision: str) -> Path | None:
        """The files of a branch, tag or commit; None if there is no such."""
        revisions = self.models.get(name, {})
        return revisions.get(revision) or {commit_of(each): each for each in revisions.values()}.get(revision)

    def command(self, *arguments: object, offline: bool = False) -> subprocess.CompletedProcess[str]:
        """Run a command of flashmorph's, as `python` does."""
        return self.python("-m", "flashmorph", *arguments, offline=offline)

    def python(self, *arguments: object, offline: bool = False) -> subprocess.CompletedProcess[str]:
        """Run Python in a process whose hub this is; `offline` with what was fetched before alone."""
        own = {"HF_ENDPOINT": self.address, "HF_HOME": str(self.home), "HF_HUB_OFFLINE": str(int(offline))}
        own |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "COLUMNS": "200"}
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            env={**os.environ, **own},
            capture_output=True,
            text=True,
        )


@contextmanager
def local_hub(home: Path, models: dict[str, dict[str, Path]]) -> Iterator[Hub]:
    """A hub with these models while this lasts; `home` is the client's folder, as HF_HOME."""
    hub = Hub(models, home)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Answers", (_Answers,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Answers(BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer(False)

    def do_GET(self) -> None:
        self._answer(True)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, content: bool) -> None:
        for pattern, answer in ((_INFO, self._info), (_TREE, self._tree), (_FILE, self._file)):
            if parts := pattern.match(self.path.partition("?")[0]):
                name, revision, *file = map(unquote, parts.groups())
                if name not in self.hub.models:
                    return self._send(404, {"X-Error-Code": "RepoNotFound"})
                folder = self.hub.folder(name, revision)
                if folder is None:
                    return self._send(404, {"X-Error-Code": "RevisionNotFound"})
                return answer(content, folder, name, *file)
        return self._send(404, {})

    def _info(self, content: bool, folder: Path, name: str) -> None:
        siblings = [{"rfilename": path.name} for path in sorted(folder.iterdir())]
        values = {"id": name, "modelId": name, "sha": commit_of(folder), "siblings": siblings, "private": False}
        self._send(200, {"Content-Type": "application/json"}, json.dumps(values).encode(), content)

    def _tree(self, content: bool, folder: Path, name: str) -> None:
        files = [
            {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": path.name}
            for path in folder.iterdir()
        ]
        self._send(200, {"Content-Type": "application/json"}, json.dumps(files).encode(), content)

    def _file(self, content: bool, folder: Path, name: str, file: str) -> None:
        if not (folder / file).is_file():
            return self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit_of(folder)})
        body = (folder / file).read_bytes()
        if content:
            self.hub.asked.append(file)
        headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": commit_of(folder)}
        self._send(200, headers, body, content)

    def _send(self, status: int, headers: dict[str, str], body: bytes = b"", content: bool = False) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if content:
            self.wfile.write(body)
