"""Tokens a second of `align` on a CPU: transformers' references against ours, branches run twice and once.

    python benchmarks/align_speed.py --threads 1

Random teachers with four of SmolLM2-135M's layers: width 576, 9 heads and 3 key-value heads of 64. A step is forward
and backward of the alignment loss over four rows of 512 tokens. The ways take turns, step by step, so that a
drift of the machine meets all alike. Writes `benchmarks/results/align_speed.json`.
"""

import argparse
import importlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from flashmorph.cli.options import quiet
from flashmorph.convert.in_memory import transplant
from flashmorph.devices import use_bf16
from flashmorph.files import write_json
from flashmorph.mixers import Kernels
from flashmorph.model.morphable import Morphable, attach
from flashmorph.stages.align import AlignmentLoss

SHAPE: dict[str, Any] = {
    "vocab_size": 1_024,
    "hidden_size": 576,
    "intermediate_size": 1_536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 2_048,
}
TEACHERS: dict[str, tuple[type, dict[str, Any]]] = {
    "Mamba2, expand 2": (LlamaConfig, {}),
    "Mamba2, expand 1": (LlamaConfig, {"mamba_expand": 1}),
    "Gated DeltaNet": (Qwen3Config, {}),
}
WAYS = {
    "transformers' references, branches twice": (False, True),
    "ours, branches twice": (True, True),
    "ours, branches once": (True, False),
}


@contextmanager
def transformers_own(kernels: Kernels) -> Iterator[None]:
    """transformers' references in place of our lean functions."""
    module = importlib.import_module(kernels.module)
    ours = {name: getattr(module, name) for name in kernels.lean}
    for name, function in ours.items():
        setattr(module, name, function.decorated.__wrapped__)
    try:
        yield
    finally:
        for name, function in ours.items():
            setattr(module, name, function)


def step(morphable: Morphable, ids: torch.Tensor, lean: bool, recompute: bool, bf16: bool) -> float:
    """Seconds of one forward and backward."""
    kernels = next(mixer.kernels for mixer in morphable.host.mixers.values() if mixer.kernels)
    started = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        if lean:
            loss = AlignmentLoss(morphable, recompute)(ids)["loss"]
            loss.backward()
        else:
            with transformers_own(kernels):
                AlignmentLoss(morphable, recompute)(ids)["loss"].backward()
    morphable.zero_grad()
    return time.perf_counter() - started


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5, help="steps of each way, after one that is not counted")
    parser.add_argument("--float32", action="store_true", help="products in float32 also where bfloat16 is fast")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/align_speed.json"))
    arguments = parser.parse_args()
    quiet()
    torch.set_num_threads(arguments.threads)
    bf16 = use_bf16(torch.device("cpu")) and not arguments.float32
    rows = []
    for name, (kind, settings) in TEACHERS.items():
        torch.manual_seed(0)
        teacher = AutoModelForCausalLM.from_config(kind(**SHAPE, num_hidden_layers=arguments.layers))
        ids = torch.randint(SHAPE["vocab_size"], (arguments.rows, arguments.length))
        morphable, _ = attach(transplant(teacher, settings)[0], ids[:1])
        for weights in morphable.branch_parameters():
            for weight in weights:
                weight.requires_grad_(True)
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for number in range(arguments.repeats + 1):
            for way, (lean, recompute) in WAYS.items():
                took = step(morphable, ids, lean, recompute, bf16)
                if number:
                    seconds[way].append(took)
        first = float(np.median(seconds[next(iter(WAYS))]))
        for way, times in seconds.items():
            median = float(np.median(times))
            row = {"mixer": name, "way": way, "tokens_per_second": ids.numel() / median, "faster": first / median}
            rows.append({**row, "seconds": times})
    about = {"command": " ".join(["python", *sys.argv]), "bf16": bf16, "threads": arguments.threads}
    write_json(arguments.output, {**about, "rows": rows})
    table = Table(title=f"align, {arguments.layers} layers of width 576", title_justify="left")
    for column in ("mixer", "way", "tokens a second", "times faster"):
        table.add_column(column, justify="left" if column in ("mixer", "way") else "right")
    for row in rows:
        table.add_row(row["mixer"], row["way"], f"{row['tokens_per_second']:,.0f}", f"{row['faster']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
