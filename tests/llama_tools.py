"""What tests and benchmarks need of a llama.cpp besides itself: another converter, and programs linked to it."""

import shutil
import subprocess
from pathlib import Path

from flashmorph.pipeline.export import CONVERTER


def stand_in(llama_cpp: Path, place: Path) -> Path:
    """Make `place` a folder that stands for the checkout `llama_cpp`, its converter taking any tokenizer."""
    place.mkdir(parents=True)
    (place / "gguf-py").symlink_to((llama_cpp / "gguf-py").resolve())
    shutil.copy(Path(__file__).with_name("any_tokenizer.py"), place / CONVERTER)
    return place


def compiled(llama_cpp: Path, source: Path, place: Path) -> Path:
    """A program from one C++ file, linked to the shared libraries in `build/bin` of this llama.cpp."""
    program, libraries = place / source.stem, (llama_cpp / "build" / "bin").resolve()
    include = [f"-I{llama_cpp / folder}" for folder in ("include", "ggml/include")]
    link = [f"-L{libraries}", "-lllama", "-lggml", "-lggml-base", f"-Wl,-rpath,{libraries}"]
    subprocess.run(["c++", "-std=c++17", "-O1", *include, source, *link, "-o", program], check=True)
    return program
