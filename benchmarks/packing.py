"""Training tokens a second of a hybrid on documents joined in rows, kept apart in rows, and padded one a row.

    python benchmarks/packing.py --teacher tiny --length 512

Documents are as long as chance makes them, `--document-tokens` on average (0: the text's own). The three ways take
turns, step by step, so that a drift of the machine meets all alike. A step is forward and backward of next-token
training over the same text; only tokens of text count. Writes `benchmarks/results/packing-DEVICE.json`.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import flashmorph
from flashmorph.cli.options import quiet
from flashmorph.convert.teacher import open_teacher
from flashmorph.data.corpus import Corpus
from flashmorph.data.isolation import Packed, apart, cut, how_apart
from flashmorph.data.rows import pack
from flashmorph.devices import pick_device, use_bf16
from flashmorph.files import write_json
from flashmorph.hosts import host_of, supports_varlen
from flashmorph.losses import Head, label_loss
from flashmorph.plan import Budget
from flashmorph.selection import BASELINE
from flashmorph.selection.search import plan_without_search
from flashmorph.stages import collate


def padded(input_ids: torch.Tensor, starts: torch.Tensor) -> list[Packed]:
    """One document a row, every row as long as `input_ids`'s, as many rows at once."""
    rows, length = input_ids.shape
    batches = []
    documents = []
    for each in cut(input_ids, starts):
        assert each.real is not None
        documents += [ids[real] for ids, real in zip(each.input_ids, each.real, strict=True)]
    for first in range(0, len(documents), rows):
        chosen = documents[first : first + rows]
        ids = torch.stack([torch.nn.functional.pad(each, (0, length - len(each))) for each in chosen])
        places = torch.arange(length, device=ids.device)
        real = places < torch.tensor([len(each) for each in chosen], device=ids.device)[:, None]
        batches.append(Packed(ids, real=real, continues=real & (places > 0)))
    return batches


def step(model, batches: list[Packed], bf16: bool) -> None:
    """Forward and backward, one batch after the other."""
    device = model.device.type
    for each in batches:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            places, following = each.next_tokens()
            loss = label_loss(each.run(model.model)[places], Head.of(model), following)
        loss.backward()
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="tiny")
    parser.add_argument("--data", default="demo")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--document-tokens", type=int, default=300)
    parser.add_argument("--rows", type=int, default=8, help="rows in a step")
    parser.add_argument("--steps", type=int, default=20, help="steps of each way, after two that are not counted")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    quiet()
    torch.manual_seed(0)
    device, teacher = pick_device(arguments.device), open_teacher(arguments.teacher)
    tokenizer = teacher.tokenizer()
    assert tokenizer
    with tempfile.TemporaryDirectory() as folder:
        path, rows = Path(folder) / "rows.npy", arguments.rows * (arguments.steps + 2)
        found = pack(Corpus(arguments.data), tokenizer, "train", arguments.length, rows, 0, path, None)
        batches = [
            collate([found[row] for row in range(first, first + arguments.rows)])
            for first in range(0, rows, arguments.rows)
        ]
    host, _ = flashmorph.transplant(teacher.load(torch.float32, device))
    morphable, _ = flashmorph.attach(host, batches[0]["input_ids"][:2])
    budget = Budget.parse("25%")
    model = flashmorph.build(morphable, plan_without_search(BASELINE, morphable.space(budget), budget)).to(device)
    varlen = supports_varlen(host_of(model.config), device)
    ways = {
        "joined, documents see each other": lambda ids, starts: [Packed(ids)],
        how_apart(True, varlen): lambda ids, starts: apart(ids, starts, varlen),
        "padded, one document a row": padded,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    run_tokens = dict.fromkeys(ways, 0)
    for number, batch in enumerate(batches):
        ids = batch["input_ids"].to(device)
        starts = batch.get("starts", torch.zeros_like(batch["input_ids"], dtype=torch.bool))
        if arguments.document_tokens:
            starts = torch.rand(starts.shape) < 1 / arguments.document_tokens
        starts = starts.to(device)
        for name, way in ways.items():
            started = time.perf_counter()
            packed = way(ids, starts)
            step(model, packed, use_bf16(device))
            if number >= 2:
                seconds[name].append(time.perf_counter() - started)
                run_tokens[name] += sum(each.input_ids.numel() for each in packed)
    tokens = arguments.rows * arguments.length
    figures = {
        name: {
            "tokens_per_second": [float(tokens / np.quantile(times, share)) for share in (0.75, 0.5, 0.25)],
            "share_of_text": tokens * len(times) / run_tokens[name],
        }
        for name, times in seconds.items()
    }
    output = arguments.output or Path(f"benchmarks/results/packing-{device.type}.json")
    about = {"command": " ".join(["python", *sys.argv]), "teacher": teacher.digest, "device": str(device)}
    sizes = {name: getattr(arguments, name) for name in ("length", "rows", "document_tokens")}
    write_json(output, {**about, **sizes, "ways": figures})
    table = Table(title=f"tokens of text a second, {arguments.length} tokens a row", title_justify="left")
    for column in ("way", "median", "quartiles", "text among what is run"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for name, values in figures.items():
        low, middle, high = values["tokens_per_second"]
        table.add_row(name, f"{middle:,.0f}", f"{low:,.0f} - {high:,.0f}", f"{values['share_of_text']:.0%}")
    Console().print(table)


if __name__ == "__main__":
    main()
