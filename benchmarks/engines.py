"""What a hybrid is worth in engines: SmolLM2-135M's shape against its hybrids, in vLLM on a CPU and in llama.cpp.

    python benchmarks/engines.py vllm --vllm-python .vllm/venv/bin/python
    python benchmarks/engines.py llama.cpp --llama-cpp .llama.cpp/llama_cpp_python-0.3.36/vendor/llama.cpp

Random weights: speed does not depend on what they know. The teacher is a Llama; `windows` is its hybrid as Ministral,
`mamba2` as Granite, with the same full layers. vLLM runs Ministral with transformers' layers and Llama with its own, so
`all full` is the teacher as Ministral. Models take turns, and ratios are taken within rounds. Times are processor
seconds of one thread, which other work on the machine disturbs less than the clock's (in the file as well). Caches are
blocks that vLLM took for the sequence, beside our arithmetic. Writes `benchmarks/results/engines.json`, a part for each
engine.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from llama_cpp import rounds
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig

from flashmorph.bench.growth import spread
from flashmorph.cli.options import OUT, numbers, quiet
from flashmorph.cli.screen import RichScreen
from flashmorph.convert.save import save_model
from flashmorph.files import write_json
from flashmorph.hosts import configure
from flashmorph.hosts.host import Host
from flashmorph.hosts.vllm_cache import vllm_cache
from flashmorph.mixers import LINEAR, SLIDING
from flashmorph.pipeline.export import CONVERTER, export_gguf
from flashmorph.plan import FULL

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from llama_tools import compiled, stand_in

SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
}
WINDOW = 128
HYBRIDS: dict[str, tuple[dict[str, int], str]] = {
    "all full": ({"window": WINDOW}, FULL),
    "windows": ({"window": WINDOW}, SLIDING),
    "mamba2": ({}, LINEAR),
}
"""Settings of the host, and what switched layers become."""
LAYERS = "7,8,12,15,17,18,20"
"""The best known plan of SmolLM2-135M-Instruct with windows."""
BATCHED, BLOCK = 2048, 128
"""Tokens of a batch in vLLM's server on a CPU, and of its blocks there."""
KINDS = ("prefill", "decode")
AT_ONCE = "the machine was shared: times are processor seconds"


@dataclass
class Made:
    """A checkpoint in `folder` with random weights, and the host's view of it (None: the teacher)."""

    folder: Path
    config: PreTrainedConfig
    parameters: int
    host: Host | None = None
    options: tuple[str, ...] = ()

    def our_cache(self, tokens: int) -> int | None:
        """Bytes of one sequence in vLLM on a CPU without prefix caching, by `vllm_cache`."""
        if self.host is None:
            return None
        self.config.mamba_ssm_dtype = "float32"  # What vLLM makes of Mamba2's state on a CPU with AVX512_BF16.
        cache = vllm_cache(self.host, self.config, self.options, block_tokens=BLOCK, state_pages=1)
        return cache and cache.sequence_bytes(tokens)


def make(place: Path, names: list[str], full: list[int], dtype: torch.dtype, longest: int) -> dict[str, Made]:
    """Checkpoints of the teacher and of the named hybrids."""
    rope = {"rope_type": "default", "rope_theta": 1e5}
    shape = {**SHAPE, "max_position_embeddings": longest, "rope_parameters": rope, "tie_word_embeddings": True}
    config = LlamaConfig(**shape, dtype=dtype)
    teacher = LlamaForCausalLM(config).to(dtype=dtype)
    teacher.save_pretrained(place / "teacher")
    for path in Path(str(files("flashmorph") / "assets" / "tiny")).glob("tokenizer*"):
        shutil.copy(path, place / "teacher")
    made = {"teacher": Made(place / "teacher", config, teacher.num_parameters())}
    for name in names:
        settings, switched = HYBRIDS[name]
        host, whole = configure(config, settings)
        options = tuple(FULL if layer in full else switched for layer in range(config.num_hidden_layers))
        model = host.model_class(host.with_plan(whole, options)).to(dtype=dtype)
        save_model(model, place / name, place / "teacher")
        model.config.dtype = dtype  # Saving has made a word of it.
        made[name] = Made(place / name, model.config, model.num_parameters(), host, options)
    return made


def in_vllm(arguments: argparse.Namespace, place: Path) -> dict[str, Any]:
    """vLLM's figures, with ratios within rounds and our caches beside its own."""
    lengths = numbers("--lengths", arguments.lengths)
    full = numbers("--layers", arguments.layers)
    made = make(place, list(HYBRIDS), full, getattr(torch, arguments.dtype), 2 * max(lengths))
    models: dict[str, dict[str, Any]] = {name: {"folder": str(each.folder)} for name, each in made.items()}
    models["all full"]["longest"] = arguments.control_length
    job = {"models": models, "lengths": lengths, "batched": BATCHED, "profile": arguments.profile}
    job |= {name: getattr(arguments, name) for name in ("dtype", "repeats", "decode_tokens")}
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[1] / "tests" / "vllm_site"),
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # Bound to one core, it waits for others there.
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    output, done = place / "times.json", 0
    total = arguments.repeats * sum(
        length <= each.get("longest", length) for length in lengths for each in models.values()
    )
    command = [str(arguments.vllm_python), str(Path(__file__).with_name("vllm_times.py")), str(output)]
    with (place / "log").open("w") as log, RichScreen(Console(stderr=True)).stage("bench", "vLLM") as report:
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
        with subprocess.Popen(command, text=True, env=environment, **pipes) as process:
            assert process.stdin and process.stdout
            process.stdin.write(json.dumps(job))
            process.stdin.close()
            for line in process.stdout:
                if line.rsplit(" ", 1)[0] in made:
                    done += 1
                    report(done, total)
    if not output.is_file():
        sys.exit(f"vLLM failed: {(place / 'log').read_text()[-3000:]}")
    found = json.loads(output.read_text())
    rows = [row_of(each, found["cache"], made, arguments.decode_tokens) for each in found["by_length"]]
    parameters = {name: each.parameters for name, each in made.items()}
    return {"parameters": parameters, "cache": found["cache"], "by_length": rows, "profile": found.get("profile")}


def row_of(found: dict, caches: dict, made: dict[str, Made], num_decoded: int) -> dict[str, Any]:
    """One length: of each model seconds by kind, how many times faster than the teacher, and bytes of cache."""
    length, row = found["length"], {"length": found["length"]}
    for name, tries in found["rounds"].items():
        figures: dict[str, Any] = {}
        for kind in KINDS:
            for clock in (kind, f"{kind}_cpu"):
                # A step's median leaves out those that other work interrupted.
                mine, base = ([float(np.median(each[clock])) for each in found["rounds"][n]] for n in (name, "teacher"))
                figures[clock] = spread(mine)
                faster = [one / other for one, other in zip(base, mine, strict=True)]
                figures[f"{clock}_times_faster"] = {**spread(faster), "rounds": faster}
        figures["cache_bytes"] = tries[0]["blocks"] * caches[name]["block_bytes"]
        figures["our_cache_bytes"] = made[name].our_cache(length + num_decoded)
        row[name] = figures
    return row


def in_llama_cpp(arguments: argparse.Namespace, place: Path) -> dict[str, Any]:
    """llama.cpp's figures by type of weights; its cache is in float16 in all of them."""
    lengths = numbers("--lengths", arguments.lengths)
    made = make(place, ["mamba2"], numbers("--layers", arguments.layers), torch.float32, 2 * max(lengths))
    program = compiled(arguments.llama_cpp, Path(__file__).with_name("llama_times.cpp"), place)
    converter = stand_in(arguments.llama_cpp, place / "llama.cpp")
    settings = argparse.Namespace(repeats=arguments.repeats, decode_tokens=arguments.decode_tokens, threads=1)
    found: dict[str, Any] = {}
    for kind in arguments.types:
        pair = {"teacher": place / f"teacher-{kind}.gguf", "hybrid": place / f"hybrid-{kind}.gguf"}
        # `flashmorph export` is for hybrids; a Llama is the converter's own business.
        whole = [made["teacher"].folder, "--outfile", pair["teacher"], "--outtype", kind]
        subprocess.run([sys.executable, converter / CONVERTER, *whole], check=True, capture_output=True)
        export_gguf(made["mamba2"].folder, pair["hybrid"], converter, kind)
        sizes = {name: file.stat().st_size for name, file in pair.items()}
        found[kind] = {"file_bytes": sizes, "by_length": rounds(settings, program, pair, lengths)}
    return {"parameters": {name: each.parameters for name, each in made.items()}, "by_type": found}


def lines(engine: str, found: dict[str, Any]) -> list[list[str]]:
    """Cells of the table: a line for each model and length."""
    table = []
    if engine == "vllm":
        for row in found["by_length"]:
            for name in (name for name in row if name != "length"):
                figures = row[name]
                speeds = row["length"] / figures["prefill_cpu"]["median"], 1 / figures["decode_cpu"]["median"]
                faster = [figures[f"{kind}_cpu_times_faster"] for kind in KINDS]
                ours = figures["our_cache_bytes"]
                caches = f"{figures['cache_bytes'] / 2**20:,.1f}", f"{ours / 2**20:,.1f}" if ours else ""
                table.append([f"{row['length']:,}", name, *_speeds(speeds, faster), *caches])
        return table
    for kind, each in found["by_type"].items():
        for row in each["by_length"]:
            for name in ("teacher", "hybrid"):
                times = [row[part][name]["median"] for part in ("prefill_cpu", "decode_cpu")]
                faster = [row[part]["times_faster"] for part in ("prefill_cpu", "decode_cpu")]
                faster = faster if name == "hybrid" else [{"median": 1.0, "quartiles": (1.0, 1.0)}] * 2
                cells = _speeds((row["length"] / times[0], 1 / times[1]), faster)
                title = f"{kind} {'mamba2' if name == 'hybrid' else name}"
                table.append([f"{row['length']:,}", title, *cells, f"{row['cache_mib'][name]:,.1f}", ""])
    return table


def _speeds(speeds: tuple[float, float], faster: list[dict]) -> list[str]:
    cells = []
    for speed, ratio in zip(speeds, faster, strict=True):
        low, high = ratio["quartiles"]
        cells += [f"{speed:,.1f}", f"{ratio['median']:.2f} ({low:.2f}-{high:.2f})"]
    return cells


def show(engine: str, found: dict[str, Any]) -> None:
    """The table."""
    table = Table(title=f"{engine}: tokens a processor second, one sequence", title_justify="left")
    for column in ("context", "model", "prefill", "x teacher", "decode", "x teacher", "cache, MiB", "ours"):
        table.add_column(column, justify="right")
    for line in lines(engine, found):
        table.add_row(*line)
    OUT.print(table)


def main() -> None:
    """Make the models, time them in one engine, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=("vllm", "llama.cpp"))
    parser.add_argument("--vllm-python", type=Path, default=Path(".vllm/venv/bin/python"))
    parser.add_argument("--llama-cpp", type=Path)
    parser.add_argument("--layers", default=LAYERS, help="the full ones")
    parser.add_argument("--lengths", default="512,2048,8192")
    parser.add_argument("--control-length", type=int, default=2048, help="the longest of `all full`")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--decode-tokens", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16", help="in vLLM")
    parser.add_argument("--profile", type=int, default=2048, help="a length to profile in vLLM; 0: none")
    parser.add_argument(
        "--types", nargs="+", default=["f16", "q8_0"], help="in llama.cpp, as the converter's --outtype"
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/engines.json"))
    arguments = parser.parse_args()
    if arguments.engine == "llama.cpp" and not (arguments.llama_cpp and arguments.llama_cpp.is_dir()):
        parser.error("--llama-cpp must name the folder of a built llama.cpp")
    if arguments.engine == "vllm" and not arguments.vllm_python.is_file():
        parser.error(f"there is no {arguments.vllm_python}: make test-vllm installs vLLM")
    quiet()
    torch.manual_seed(0)
    with TemporaryDirectory() as place:
        found = (in_vllm if arguments.engine == "vllm" else in_llama_cpp)(arguments, Path(place))
    settings = {name: getattr(arguments, name) for name in ("layers", "repeats", "decode_tokens")}
    about = {"command": f"python benchmarks/engines.py {shlex.join(sys.argv[1:])}"}
    whole = json.loads(arguments.output.read_text()) if arguments.output.is_file() else {"shape": SHAPE}
    write_json(arguments.output, {**whole, arguments.engine: {**about, "note": AT_ONCE, **settings, **found}})
    show(arguments.engine, found)


if __name__ == "__main__":
    main()
