"""From which length on is a mixer of single heads faster than full attention?

    python benchmarks/mixer_times.py --lengths 2048,8192 --turns 3
    python benchmarks/mixer_times.py --lengths 4096,16384,32768 --turns 3 --mixers thin
    python benchmarks/mixer_times.py --lengths 65536 --turns 2 --mixers thin

Times a layer's mixing alone, without projections: reading a text of that length at once, and writing one token after
it, for each mixer of our own type against PyTorch's scaled_dot_product_attention on the same random queries, keys and
values (one sequence, 9 query and 3 key-value heads of 64: SmolLM2-135M's). A turn runs full attention and then each
mixer; a ratio is taken within each turn, and the table has its median, and smallest and largest. Above 1 the mixer is
faster. Rows of `benchmarks/results/mixer_times.json` that are not measured again stay.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from flashmorph.files import write_json
from flashmorph.own import start
from flashmorph.own.mixers_flashmorph import make_mixer

HEADS, GROUPS, DIM, WIDTH = 3, 3, 64, 576
KINDS = ("read", "write")
SETTINGS = {
    "window 128 + 4": {"kind": "window", "size": 128, "sinks": 4},
    "linear": {"kind": "linear"},
    "thin 64, window 128 + 4": {"kind": "thin", "points": 64, "window": 128, "sinks": 4},
    "thin 64 by express, window 128 + 4": {
        "kind": "thin",
        "points": 64,
        "window": 128,
        "sinks": 4,
        "schedule": "express",
    },
    "pooled 16, window 128 + 4": {"kind": "pooled", "segment": 16, "window": 128, "sinks": 4},
    "dash 64, gamma 1": {"kind": "dash", "chunk": 64, "gamma": 1.0},
}


def main() -> None:
    """Time, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="2048,4096,8192,16384")
    parser.add_argument("--turns", type=int, default=5, help="after one that is not counted")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--mixers", nargs="+", default=[""], help="only those whose names begin so")
    parser.add_argument("--most", type=float, default=20.0, help="seconds of one reading above which a mixer stops")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/mixer_times.json"))
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(arguments.threads)
    machine = torch.cuda.get_device_name() if device == "cuda" else f"a CPU, {arguments.threads} thread(s)"
    about = {"machine": machine, "torch": torch.__version__}
    known = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    rows = known["rows"] if about.items() <= known.items() else []
    names = [name for name in SETTINGS if name.startswith(tuple(arguments.mixers))]
    for length in map(int, arguments.lengths.split(",")):
        timed = times(names, length, device, arguments.turns)
        new = [{"mixer": name, "length": length, "turns": arguments.turns, **row} for name, row in timed.items()]
        rows = [row for row in rows if not (row["mixer"] in names and row["length"] == length)] + new
        rows.sort(key=lambda row: (row["length"], list(SETTINGS).index(row["mixer"])))
        write_json(arguments.output, {**about, "rows": rows})
        names = [name for name in names if timed[name]["read_seconds"] <= arguments.most]
    table = Table(title=f"speed of a mixer over that of full attention; {machine}", title_justify="left")
    for column in ("mixer", "length", "reading", "writing"):
        table.add_column(column, justify="left" if column == "mixer" else "right")
    for row in rows:
        ratios = (f"{row[kind]:.2f} ({row[kind + '_range'][0]:.2f} to {row[kind + '_range'][1]:.2f})" for kind in KINDS)
        table.add_row(row["mixer"], f"{row['length']:,}", *ratios)
    Console(width=120).print(table)


@torch.no_grad()
def times(names: list[str], length: int, device: str, turns: int) -> dict[str, dict[str, Any]]:
    """For each mixer medians over turns: how much faster than full attention, and seconds of both."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    drawn = torch.Generator(device).manual_seed(length)

    def random(heads: int, tokens: int) -> torch.Tensor:
        return torch.randn(1, heads, tokens, DIM, generator=drawn, device=device, dtype=dtype)

    q, k, v = random(HEADS * GROUPS, length), random(HEADS, length), random(HEADS, length)
    hidden = torch.randn(1, length, WIDTH, generator=drawn, device=device, dtype=dtype)
    new = [random(heads, 1) for heads in (HEADS * GROUPS, HEADS, HEADS)]
    mixers, states = {}, {}
    for name in names:
        mixers[name] = make_mixer(SETTINGS[name], HEADS, GROUPS, DIM, WIDTH)
        start(mixers[name])
        mixers[name].to(device)
        states[name] = {}
        mixers[name](q, k, v, hidden, None, states[name])

    def full_step() -> None:
        keys, values = torch.cat([k, new[1]], 2), torch.cat([v, new[2]], 2)
        F.scaled_dot_product_attention(new[0], keys, values, enable_gqa=True)

    full = {
        "read": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        "write": full_step,
    }
    work = {
        name: {
            "read": lambda mixer=mixer: mixer(q, k, v, hidden, None, {}),
            "write": lambda mixer=mixer, name=name: mixer(*new, hidden[:, :1], None, dict(states[name])),
        }
        for name, mixer in mixers.items()
    }
    found: dict[str, dict[str, Any]] = {name: {} for name in names}
    for kind in KINDS:
        taken = [[seconds(each[kind], device) for each in (full, *work.values())] for _ in range(turns + 1)][1:]
        for number, name in enumerate(names, 1):
            ratios = [turn[0] / turn[number] for turn in taken]
            found[name] |= {kind: statistics.median(ratios), f"{kind}_range": [min(ratios), max(ratios)]}
            found[name][f"{kind}_seconds"] = statistics.median(turn[number] for turn in taken)
            found[name][f"{kind}_seconds_full"] = statistics.median(turn[0] for turn in taken)
            print(name, length, kind, found[name], flush=True)
    return found


def seconds(work, device: str) -> float:
    """How long it takes."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
