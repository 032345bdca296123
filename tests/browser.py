"""Headless Chromium, driven through its debugging pipe: no package of its own.

    python tests/browser.py report.html docs/report

renders a report at two widths, light and dark, as PNG.
"""

import base64
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDTHS = {"desktop": 1280, "phone": 390}
SCHEMES = ("light", "dark")
_PATIENCE = 120


def find() -> str | None:
    """The browser, if this machine has one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One tab. `complaints` are errors that it wrote to its console, `asked` the addresses that it loaded."""

    def __init__(self, send: int, receive: int):
        self._send, self._receive = send, receive
        self._left, self._number, self._session = b"", 0, None
        self.complaints: list[str] = []
        self.asked: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the DevTools protocol; what happens meanwhile is noted."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._send, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._note(answer)
        raise TimeoutError(f"{method} gave no answer in {_PATIENCE} s")

    def show(self, path: Path, width: int, scheme: str) -> None:
        """Open a file as on a screen of that width, and wait until its figures are drawn."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)
        phone = width < 600
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1, mobile=phone)
        self.call("Page.navigate", url=path.resolve().as_uri())
        deadline = time.monotonic() + _PATIENCE
        while self.ask("document.documentElement.dataset.drawn") is None:
            assert time.monotonic() < deadline, f"figures are not drawn: {self.complaints}"
            time.sleep(0.1)

    def ask(self, expression: str) -> Any:
        """The value of an expression in the page."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def picture(self) -> bytes:
        """All of the page as PNG, with a palette to keep it small."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)["data"]
        small = io.BytesIO()
        Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB").quantize(128).save(small, "PNG", optimize=True)
        return small.getvalue()

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._left:
            more = os.read(self._receive, 1 << 20)
            assert more, "the browser has gone"
            self._left += more
        message, self._left = self._left.split(b"\0", 1)
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        values = event.get("params", {})
        match event.get("method"):
            case "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(values["exceptionDetails"])[:500])
            case "Runtime.consoleAPICalled" if values["type"] in ("error", "warning", "assert"):
                self.complaints.append(json.dumps(values["args"])[:500])
            case "Log.entryAdded" if values["entry"]["level"] in ("error", "warning"):
                self.complaints.append(values["entry"]["text"])
            case "Network.requestWillBeSent":
                self.asked.append(values["request"]["url"])


@contextmanager
def open_page(folder: Path) -> Iterator[Page]:
    """A tab in a new browser whose profile lies in `folder`."""
    browser = find()
    assert browser
    (take, send), (receive, give) = os.pipe(), os.pipe()
    # The browser reads commands from descriptor 3 and answers on 4.
    script = f'exec "$@" 3<&{take} 4>&{give}'
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
    options += ["--remote-debugging-pipe", f"--user-data-dir={folder}", "--no-first-run"]
    command = ["bash", "-c", script, "bash", browser, *options]
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, pass_fds=(take, give), stdout=quiet, stderr=quiet)
    os.close(take)
    os.close(give)
    try:
        yield Page(send, receive)
    finally:
        process.terminate()
        process.wait(30)
        os.close(send)
        os.close(receive)


def render(report: Path, folder: Path, profile: Path) -> list[Path]:
    """The four renderings of a report."""
    made = []
    folder.mkdir(parents=True, exist_ok=True)
    with open_page(profile) as page:
        for screen, width in WIDTHS.items():
            for scheme in SCHEMES:
                page.show(report, width, scheme)
                made.append(folder / f"{screen}-{scheme}.png")
                made[-1].write_bytes(page.picture())
    return made


if __name__ == "__main__":
    from tempfile import TemporaryDirectory

    with TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for path in render(Path(sys.argv[1]), Path(sys.argv[2]), Path(profile)):
            print(path, path.stat().st_size)
