"""What a hybrid is worth in an engine that people use: a teacher as its own class against its hybrid, in llama.cpp.

    python benchmarks/llama_cpp.py --llama-cpp .llama.cpp/source --lengths 512,1024,2048,4096,8192,16384

Random weights: speed does not depend on what they know. Times are those of llama.cpp's own `llama-bench`, one process
for each, models in turns; cache sizes are those that llama.cpp reports. Both models go through `flashmorph export`.
`make test-serving` builds that llama.cpp; any other one that has `build/bin/llama-bench` will do. Leave the machine
alone meanwhile. Writes `benchmarks/results/llama_cpp.json`.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.table import Table
from speed import add_shape, hybrid_options, shape_of, teacher_config
from transformers import Qwen3ForCausalLM

from flashmorph.bench.growth import spread
from flashmorph.cli.options import OUT, numbers, quiet
from flashmorph.export import export_gguf
from flashmorph.files import write_json
from flashmorph.hosts import host_for
from flashmorph.screen import RichScreen

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from any_tokenizer import stand_in  # noqa: E402

KINDS = ("prefill", "decode")
_CACHE = re.compile(r"(?:llama_kv_cache|llama_memory_recurrent)\w*: size = +([\d.]+) MiB")


def random_pair(arguments: argparse.Namespace, place: Path) -> dict[str, Path]:
    """GGUF files of a random teacher in its own class and of a hybrid of its shape."""
    teacher = teacher_config(arguments, torch.float32)
    host = host_for(teacher)
    config = host.with_layer_types(host.host_config(teacher), hybrid_options(arguments))
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


def measure(arguments: argparse.Namespace, file: Path, kind: str, length: int) -> tuple[float, float]:
    """Seconds to read `length` tokens, or to write one token after them; and MiB of cache, as llama.cpp reports it."""
    decoded = str(arguments.decode_tokens)
    what = ("-p", str(length), "-n", "0") if kind == "prefill" else ("-p", "0", "-n", decoded, "-d", str(length))
    program = arguments.llama_cpp / "build" / "bin" / "llama-bench"
    command = [program, "-m", file, *what, "-r", "1", "-t", str(arguments.threads), "-o", "json", "-v"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (test,) = json.loads(done.stdout)
    tokens = 1 if kind == "prefill" else arguments.decode_tokens
    return test["samples_ns"][0] / 1e9 / tokens, sum(map(float, _CACHE.findall(done.stderr)))


def rounds(arguments: argparse.Namespace, pair: dict[str, Path], lengths: list[int]) -> dict[str, list[dict]]:
    """For each kind and length: seconds of both models with quartiles, how many times faster the hybrid is, caches."""
    found: dict[str, list[dict]] = {kind: [] for kind in KINDS}
    total, done = len(lengths) * len(KINDS) * arguments.repeats * len(pair), 0
    with RichScreen(Console(stderr=True)).stage("bench", "llama.cpp") as report:
        for length in lengths:
            for kind in KINDS:
                seconds: dict[str, list[float]] = {name: [] for name in pair}
                cache = {}
                for turn in range(arguments.repeats):
                    for name in list(pair) if turn % 2 == 0 else reversed(pair):
                        taken, cache[name] = measure(arguments, pair[name], kind, length)
                        seconds[name].append(taken)
                        done += 1
                        report(done, total)
                faster = [one / other for one, other in zip(seconds["teacher"], seconds["hybrid"], strict=True)]
                row = {name: spread(each) for name, each in seconds.items()}
                found[kind].append({"length": length, **row, "times_faster": spread(faster), "cache_mib": cache})
    return found


def show(found: dict[str, list[dict]]) -> None:
    """One table a kind."""
    for kind, title in zip(KINDS, ("reading a context, ms", "writing a token after it, ms"), strict=True):
        table = Table(title=f"llama.cpp: {title}", title_justify="left")
        for column in ("context", "teacher", "hybrid", "times faster", "quartiles", "cache of teacher", "of hybrid"):
            table.add_column(column, justify="right")
        for row in found[kind]:
            faster, (low, high) = row["times_faster"]["median"], row["times_faster"]["quartiles"]
            times = (f"{1e3 * row[name]['median']:,.1f}" for name in ("teacher", "hybrid"))
            caches = (f"{row['cache_mib'][name]:,.1f} MiB" for name in ("teacher", "hybrid"))
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
        pair = random_pair(arguments, Path(place))
        sizes = {name: file.stat().st_size for name, file in pair.items()}
        found = rounds(arguments, pair, lengths)
    command = f"python benchmarks/llama_cpp.py {shlex.join(sys.argv[1:])}"
    settings = {name: getattr(arguments, name) for name in ("repeats", "decode_tokens", "threads", "dtype")}
    write_json(
        arguments.output,
        {"command": command, "shape": shape_of(arguments), **settings, "file_bytes": sizes, **found},
    )
    show(found)


if __name__ == "__main__":
    main()
