"""Write the demo text that ships with flashmorph: documentation topics and sources of CPython's standard library.

    python teachers/make_demo_text.py src/flashmorph/assets

The file is made once and then frozen, so that figures do not change with the Python version. Modules that carry a
copyright line of their own are left out; what remains falls under the PSF licence, which is written beside the text.
"""

import hashlib
import json
import lzma
import random
import sys
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

TOTAL_CHARACTERS = 2_800_000
SKIPPED_FOLDERS = ("test", "tests", "site-packages", "idlelib", "lib2to3", "pydoc_data", "encodings", "turtledemo")


def documents() -> list[str]:
    """Topics first, then modules in an order fixed by the digest of their name, up to the wanted size."""
    texts = [text for _, text in sorted(topics.items())]
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    modules = [
        path
        for path in stdlib.rglob("*.py")
        if not set(SKIPPED_FOLDERS) & set(path.relative_to(stdlib).parts) and 6_000 <= path.stat().st_size <= 90_000
    ]
    modules.sort(key=lambda path: hashlib.sha256(str(path.relative_to(stdlib)).encode()).hexdigest())
    size = sum(map(len, texts))
    for path in modules:
        text = path.read_text(encoding="utf-8", errors="ignore")
        if size < TOTAL_CHARACTERS and text.isascii() and "copyright" not in text.lower():
            texts.append(text)
            size += len(text)
    return texts


def main(folder: str) -> None:
    """Cut documents into pieces of about 4,000 characters at line ends, shuffle the documents and write both files."""
    texts = documents()
    random.Random(0).shuffle(texts)
    out = Path(folder)
    with lzma.open(out / "demo_text.jsonl.xz", "wt", preset=9, encoding="utf-8") as stream:
        for text in texts:
            stream.write(json.dumps({"text": text.strip() + "\n"}) + "\n")
    licence = Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt"
    (out / "LICENSE.demo_text").write_text(licence.read_text(encoding="utf-8"), encoding="utf-8")
    print(f"{len(texts)} documents, {sum(map(len, texts)):,} characters")


if __name__ == "__main__":
    main(sys.argv[1])
