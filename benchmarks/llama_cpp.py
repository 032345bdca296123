"""What a hybrid is worth in an engine that people use: a teacher as its own class against its hybrid, in llama.cpp.

    python benchmarks/llama_cpp.py --llama-cpp .llama.cpp/llama_cpp_python-0.3.36/vendor/llama.cpp

Random weights: speed does not depend on what they know. Both models go through `flashmorph export` and take turns, a
process for each reading and writing (`llama_times.cpp`, in llama.cpp's own batches, its cache in float16 as it is by
default). Cache sizes are those that llama.cpp reports. `make test-serving` builds that llama.cpp; any other one will do
that has its shared libraries in `build/bin`. Leave the machine alone meanwhile. Writes
`benchmarks/results/llama_cpp.json`.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from speed import add_shape, hybrid_options, shape_of, teacher_config
from transformers import Qwen3ForCausalLM

from flashmorph.bench.growth import spread
from flashmorph.cli.options import OUT, numbers, quiet
from flashmorph.cli.screen import RichScreen
from flashmorph.files import write_json
from flashmorph.hosts import host_for
from flashmorph.pipeline.export import export_gguf

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from llama_tools import compiled, stand_in

KINDS = ("prefill", "decode")
TIMES = (*KINDS, *(f"{kind}_cpu" for kind in KINDS))
"""Seconds by the clock and of the processor, as `llama_times` prints them."""
_CACHE = re.compile(r"(?:llama_kv_cache|llama_memory_recurrent)\w*: size = +([\d.]+) MiB")


def random_pair(arguments: argparse.Namespace, place: Path) -> dict[str, Path]:
    """GGUF files of a random teacher in its own class and of a hybrid of its shape."""
    teacher = teacher_config(arguments, torch.float32)
    host = host_for(teacher)
    config = host.with_plan(host.config(teacher), hybrid_options(arguments))
    converter = stand_in(arguments.llama_cpp, place / "llama.cpp")
    found = {}
    for name, model_class, shape in (("teacher", Qwen3ForCausalLM, teacher), ("hybrid", host.model_class, config)):
        torch.manual_seed(0)
        model_class(shape).save_pretrained(place / name)
        for path in Path(str(files("flashmorph") / "assets" / "tiny")).glob("tokenizer*"):
            shutil.copy(path, place / name)
        found[name] = place / f"{name}.gguf"
        export_gguf(place / name, found[name], converter, arguments.dtype)
    return found


def measure(command: list) -> tuple[dict[str, float], float]:
    """Seconds by kind and clock, to read the context and to write one token; and MiB of cache, as llama.cpp says."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    return dict(zip(TIMES, map(float, done.stdout.split()), strict=True)), sum(map(float, _CACHE.findall(done.stderr)))


def rounds(arguments: argparse.Namespace, program: Path, pair: dict[str, Path], lengths: list[int]) -> list[dict]:
    """For each length and kind: seconds of both models and how many times faster the hybrid is, with quartiles."""
    found, total, done = [], len(lengths) * arguments.repeats * len(pair), 0
    with RichScreen(Console(stderr=True)).stage("bench", "llama.cpp") as report:
        for length in lengths:
            seconds: dict[str, list[dict[str, float]]] = {name: [] for name in pair}
            cache: dict[str, float] = {}
            for turn in range(arguments.repeats):
                for name in list(pair) if turn % 2 == 0 else reversed(pair):
                    taken, cache[name] = measure(
                        [program, pair[name], length, arguments.decode_tokens, arguments.threads]
                    )
                    seconds[name].append(taken)
                    done += 1
                    report(done, total)
            row: dict[str, Any] = {"length": length, "cache_mib": cache}
            for kind in TIMES:
                times = {name: [each[kind] for each in tries] for name, tries in seconds.items()}
                faster = [one / other for one, other in zip(times["teacher"], times["hybrid"], strict=True)]
                row[kind] = {name: spread(each) for name, each in times.items()} | {"times_faster": spread(faster)}
            found.append(row)
    return found


def show(found: list[dict]) -> None:
    """One table a kind."""
    for kind, title in zip(KINDS, ("reading a context, ms", "writing a token after it, ms"), strict=True):
        table = Table(title=f"llama.cpp: {title}", title_justify="left")
        for column in ("context", "teacher", "hybrid", "times faster", "quartiles", "cache of teacher", "of hybrid"):
            table.add_column(column, justify="right")
        for row in found:
            faster, (low, high) = row[kind]["times_faster"]["median"], row[kind]["times_faster"]["quartiles"]
            times = (f"{1e3 * row[kind][name]['median']:,.1f}" for name in ("teacher", "hybrid"))
            caches = (f"{row['cache_mib'][name]:,.2f} MiB" for name in ("teacher", "hybrid"))
            table.add_row(f"{row['length']:,}", *times, f"{faster:.2f}", f"{low:.2f}-{high:.2f}", *caches)
        OUT.print(table)


def main() -> None:
    """Make the pair, time it, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", type=Path, required=True)
    add_shape(parser)
    parser.add_argument("--lengths", default="512,1024,2048,4096,8192,16384")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--decode-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--dtype", default="f32", help="as the converter's --outtype")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/llama_cpp.json"))
    arguments = parser.parse_args()
    quiet()
    lengths = numbers("--lengths", arguments.lengths)
    with TemporaryDirectory() as place:
        program = compiled(arguments.llama_cpp, Path(__file__).with_name("llama_times.cpp"), Path(place))
        pair = random_pair(arguments, Path(place))
        sizes = {name: file.stat().st_size for name, file in pair.items()}
        found = rounds(arguments, program, pair, lengths)
    command = f"python benchmarks/llama_cpp.py {shlex.join(sys.argv[1:])}"
    settings = {name: getattr(arguments, name) for name in ("repeats", "decode_tokens", "threads", "dtype")}
    write_json(
        arguments.output,
        {"command": command, "shape": shape_of(arguments), **settings, "file_bytes": sizes, "by_length": found},
    )
    show(found)


if __name__ == "__main__":
    main()
