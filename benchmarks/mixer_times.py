"""From which length on is a mixer of single heads faster than full attention?

    python benchmarks/mixer_times.py --lengths 2048,4096,8192,16384 --output benchmarks/results/mixer_times.json

Times a layer's mixing alone, without projections: reading a text of that length at once, and writing one token after
it, for each mixer of our own type against PyTorch's scaled_dot_product_attention on the same random queries, keys and
values (one sequence, 9 query and 3 key-value heads of 64: SmolLM2-135M's). Both run in turns; a ratio is taken within
each turn, and the table has its median. Above 1 the mixer is faster.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from flashmorph.files import write_json
from flashmorph.own import start
from flashmorph.own.mixers_flashmorph import make_mixer

HEADS, GROUPS, DIM, WIDTH = 3, 3, 64, 576
SETTINGS = {
    "window 128 + 4": {"kind": "window", "size": 128, "sinks": 4},
    "linear": {"kind": "linear"},
    "thin 64, window 128 + 4": {"kind": "thin", "points": 64, "window": 128, "sinks": 4},
    "pooled 16, window 128 + 4": {"kind": "pooled", "segment": 16, "window": 128, "sinks": 4},
    "dash 64, gamma 1": {"kind": "dash", "chunk": 64, "gamma": 1.0},
}


def main() -> None:
    """Time, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="2048,4096,8192,16384")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--most", type=float, default=20.0, help="seconds of one reading above which a mixer stops")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/mixer_times.json"))
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(arguments.threads)
    rows, slow = [], set()
    for length in map(int, arguments.lengths.split(",")):
        for name, settings in SETTINGS.items():
            if name not in slow:
                row = {"mixer": name, "length": length, **times(settings, length, device, arguments.turns)}
                slow |= {name} if row["read_seconds"] > arguments.most else set()
                rows.append(row)
                print(row, flush=True)
    machine = torch.cuda.get_device_name() if device == "cuda" else f"a CPU, {arguments.threads} thread(s)"
    write_json(arguments.output, {"machine": machine, "torch": torch.__version__, "rows": rows})
    table = Table(title=f"speed of a mixer over that of full attention; {machine}", title_justify="left")
    for column in ("mixer", "length", "reading", "writing"):
        table.add_column(column, justify="left" if column == "mixer" else "right")
    for row in rows:
        table.add_row(row["mixer"], f"{row['length']:,}", f"{row['read']:.2f}", f"{row['write']:.2f}")
    Console().print(table)


@torch.no_grad()
def times(settings: dict, length: int, device: str, turns: int) -> dict[str, float]:
    """Medians over turns: how much faster than full attention, and seconds of both."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    drawn = torch.Generator(device).manual_seed(length)

    def random(heads: int, tokens: int) -> torch.Tensor:
        return torch.randn(1, heads, tokens, DIM, generator=drawn, device=device, dtype=dtype)

    mixer = make_mixer(settings, HEADS, GROUPS, DIM, WIDTH)
    start(mixer)
    mixer = mixer.to(device)
    q, k, v = random(HEADS * GROUPS, length), random(HEADS, length), random(HEADS, length)
    hidden = torch.randn(1, length, WIDTH, generator=drawn, device=device, dtype=dtype)
    new = [random(heads, 1) for heads in (HEADS * GROUPS, HEADS, HEADS)]
    state: dict = {}
    mixer(q, k, v, hidden, None, state)

    def full() -> None:
        F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def full_step() -> None:
        keys, values = torch.cat([k, new[1]], 2), torch.cat([v, new[2]], 2)
        F.scaled_dot_product_attention(new[0], keys, values, enable_gqa=True)

    pairs = {
        "read": (full, lambda: mixer(q, k, v, hidden, None, {})),
        "write": (full_step, lambda: mixer(*new, hidden[:, :1], None, dict(state))),
    }
    found = {}
    for name, (theirs, ours) in pairs.items():
        taken = [(seconds(theirs, device), seconds(ours, device)) for _ in range(turns + 1)][1:]
        found[name] = statistics.median(one / other for one, other in taken)
        found[f"{name}_seconds"] = statistics.median(other for _, other in taken)
        found[f"{name}_seconds_full"] = statistics.median(one for one, _ in taken)
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
