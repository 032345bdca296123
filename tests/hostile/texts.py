"""Files of text that are cut, in no encoding, of other columns or of none."""

import gzip
import io
import json
import lzma
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import yaml
from conftest import FEW_STEPS

from flashmorph.data.corpus import Corpus
from hostile.damage import odd, spoiled
from hostile.harness import Case
from hostile.seeds import in_turn
from hostile.teachers import copy_of

_WORDS = ("river", "stone", "Größe", "日本", "a\u0301", "\u202e", "🙂", "x" * 300, "\x00", "\r", "\u2028", "<|im_end|>")
_NAMES = ("a", "ü", "a b", "[b]", "-x", "a.b", "x" * 100, "%s", "{0}")


def _line(rng: random.Random) -> str:
    return " ".join(rng.choice(_WORDS) for _ in range(rng.randrange(1, 30)))


def _row(rng: random.Random) -> Any:
    turns = [{"role": rng.choice(("user", "assistant", "x", "")), "content": _line(rng)} for _ in range(2)]
    rows = (
        {"text": _line(rng)},
        {"text": odd(rng)},
        {"other": 1},
        {"messages": turns},
        {"messages": odd(rng)},
        odd(rng),
    )
    return rng.choices(rows, (20, 1, 1, 2, 1, 1))[0]


def _jsonl(rng: random.Random) -> bytes:
    rows = [_row(rng) if rng.random() < 0.3 else {"text": _line(rng)} for _ in range(rng.choice((0, 1, 40)))]
    return "\n".join(map(json.dumps, rows)).encode("utf-8", "surrogatepass")


def _json(rng: random.Random) -> bytes:
    return json.dumps([_row(rng) for _ in range(rng.choice((0, 1, 20)))]).encode()


def _txt(rng: random.Random) -> bytes:
    text = "\n".join(_line(rng) for _ in range(rng.choice((0, 1, 200))))
    return text.encode(rng.choice(("utf-8", "utf-16", "utf-8-sig", "utf-32")), "surrogatepass")


def _parquet(rng: random.Random) -> bytes:
    columns: dict[str, list[Any]] = {rng.choice(("text", "text", "other")): [_line(rng) for _ in range(20)]}
    if rng.random() < 0.3:
        columns["text"] = [rng.choice((1, 2))] * 20
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), stream)
    return stream.getvalue()


_KINDS: dict[str, Callable[[random.Random], bytes]] = {".jsonl": _jsonl, ".json": _json, ".txt": _txt, ".md": _txt}
_KINDS[".parquet"] = _parquet


def _write(rng: random.Random, folder: Path) -> Path:
    """A folder or a file of text, each file perhaps packed, and perhaps damaged."""
    data = folder / "data"
    data.mkdir()
    paths = []
    for number in range(rng.choice((0, 1, 1, 1, 2))):
        ending = rng.choice(sorted(_KINDS))
        content = _KINDS[ending](rng)
        if rng.random() < 0.5:
            content = spoiled(rng, content)
        if ending != ".parquet" and rng.random() < 0.4:
            packed = rng.choice((".gz", ".xz"))
            content = gzip.compress(content) if packed == ".gz" else lzma.compress(content)
            content = spoiled(rng, content) if rng.random() < 0.5 else content
            ending += packed
        path = data / f"{rng.choice(_NAMES)}{number}{ending}"
        path.write_bytes(content)
        paths.append(path)
    return paths[0] if paths and rng.random() < 0.6 else data


def _read(rng: random.Random) -> Case:
    """Files that are read through, as `preflight` does."""

    def prepare(folder: Path) -> Callable[[], object]:
        corpus = Corpus(str(_write(rng, folder)), column=rng.choice(("text", "text", "text", "messages", "none", "")))

        def read() -> None:
            for document in corpus.every():
                assert isinstance(document.text, str)
            corpus.pool("train", 0)

        return read

    return Case("text", "read", prepare)


def _command(rng: random.Random) -> Case:
    """The same through the command line."""

    def prepare(folder: Path) -> list[str]:
        teacher = copy_of("qwen3", folder / "teacher")
        (folder / "recipe.yaml").write_text(yaml.safe_dump(FEW_STEPS))
        given = ["--recipe", str(folder / "recipe.yaml"), "--output", str(folder / "out"), "--dry-run"]
        return ["morph", str(teacher), *given, f"--data={_write(rng, folder)}"]

    return Case("text command", "morph --dry-run", prepare)


_MAKERS = (_read, _read, _read, _read, _read, _read, _read, _command)


def generate(seed: int, number: int) -> Iterator[Case]:
    """`number` cases."""
    return in_turn("texts", _MAKERS, seed, number)
