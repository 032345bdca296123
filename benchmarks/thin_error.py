"""Does the error of `thin` fall as one over its points, and what do its two schedules hold?

    python benchmarks/thin_error.py

Error of causal attention through `Thin` against exact softmax, over 512 queries spread over the second half of a
text of n random tokens, so that all fillings of a cache count. Heads of dimension 8, the smallest window (1 token),
four heads of each of three seeds. Keys are normal with variance 1/4 in 2, 4 or 8 dimensions, queries with variance 1.
`smooth`: values are sines of linear functions of keys; `noise`: values are independent of them; `drift`: as `smooth`,
with half of the keys' variance in a topic that is forgotten in 512 tokens, and four times longer queries near the
topic, so that recent tokens count more.

`relative` is the norm of the error over that of the exact output; `worst` the largest entry of the error over the
largest entry of the values, which the paper bounds. `coin` keeps one of each two neighbours at random, by the same
schedule; `uniform` is attention to a uniform sample of all tokens, as large as what the schedule holds. Exponents are
fitted by least squares over points up to n / 32, by seed. Finished rows are kept in
`benchmarks/results/thin_error.json` and not computed again.
"""

import argparse
import itertools
import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from scipy.signal import lfilter

from flashmorph.files import write_json
from flashmorph.own import held_after
from flashmorph.own.thin_flashmorph import SCHEDULES, Thin

DATA = {
    "smooth, 2": (2, True),
    "smooth, 4": (4, True),
    "smooth, 8": (8, True),
    "noise, 4": (4, False),
    "drift, 4": (4, True),
}
"""Dimensions of keys, and whether values follow from them."""
RULES = ("greedy", "published", "coin", "uniform")
POINTS = (8, 16, 32, 64, 128, 256)
DIM, HEADS, QUERIES, WINDOW = 8, 4, 512, 1
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Coin(Thin):
    """The schedule alone: which of two neighbours stays is drawn."""

    def _halved(self, points, bucket, by_coin, seed):
        return super()._halved(points, bucket, True, seed)


def main() -> None:
    """Compute what is missing, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="2048,4096,8192,16384")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/thin_error.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lengths = [int(each) for each in arguments.lengths.split(",")]
    rows = json.loads(arguments.output.read_text())["rows"] if arguments.output.exists() else []
    for data, length in itertools.product(DATA, lengths):
        seeds = [drawn(data, length, seed) for seed in range(arguments.seeds)]
        tensors = tuple(torch.cat(each) for each in zip(*seeds, strict=True))
        for schedule, rule in itertools.product(SCHEDULES, RULES):
            about = {"data": data, "n": length, "schedule": schedule, "rule": rule}
            if not any(about.items() <= row.items() for row in rows):
                found = [errors(tensors, points=points, **about) for points in POINTS]
                rows.append({**about, "points": POINTS, **{key: [each[key] for each in found] for key in found[0]}})
        write_json(arguments.output, {"torch": torch.__version__, "rows": rows, "held": held()})
    show(rows, lengths)


def drawn(data: str, length: int, seed: int) -> Tensors:
    """Queries, keys and values of the heads of one seed, `[1, heads, length, 8]`."""
    generator = torch.Generator().manual_seed(seed)
    dim, smooth = DATA[data]

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(1, HEADS, *shape, generator=generator)

    keys, queries = normal(length, dim) / 2, normal(length, dim)
    if data.startswith("drift"):
        kept = math.exp(-1 / 512)
        topic = lfilter([math.sqrt(1 - kept**2)], [1, -kept], normal(length, dim).numpy(), axis=2)
        topic = torch.from_numpy(topic).float()
        keys, queries = (keys + topic / 2) / math.sqrt(2), 4 * (queries + topic) / math.sqrt(2)
    values = torch.sin(keys @ normal(dim, DIM)) if smooth else normal(length, DIM)
    return F.pad(queries, (0, DIM - dim)), F.pad(keys, (0, DIM - dim)), values


@torch.no_grad()
def errors(tensors: Tensors, points: int, data: str, n: int, schedule: str, rule: str) -> dict[str, Any]:
    """Both errors by seed, and how many tokens and points are held on average."""
    q, k, v = tensors
    places = torch.arange(n // 2, n, n // 2 // QUERIES)
    sizes = [sum(held_after(int(place) + 1, points, WINDOW, 0, schedule)) for place in places]
    exact = F.scaled_dot_product_attention(q[:, :, places], k, v, attn_mask=torch.arange(n) <= places[:, None])
    if rule == "uniform":
        found = uniform(tensors, places, sizes)
    else:
        kind, halving = (Coin, "greedy") if rule == "coin" else (Thin, rule)
        mixer = kind(HEADS, 1, DIM, DIM, points, WINDOW, schedule=schedule, halving=halving)
        found = mixer(q, k, v, q[:, 0], None, None)[:, :, places]
    wrong = (found - exact).flatten(1)
    return {
        "held": round(statistics.mean(sizes), 1),
        "relative": digits(wrong.norm(dim=1) / exact.flatten(1).norm(dim=1)),
        "worst": digits(wrong.abs().amax(1) / v.flatten(1).abs().amax(1)),
    }


def uniform(tensors: Tensors, places: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Attention of each query to as many of its tokens, drawn without replacement."""
    q, k, v = tensors
    generator = torch.Generator().manual_seed(0)
    outputs = []
    for place, size in zip(places.tolist(), sizes, strict=True):
        chosen = torch.randperm(place + 1, generator=generator)[:size]
        outputs.append(F.scaled_dot_product_attention(q[:, :, place, None], k[:, :, chosen], v[:, :, chosen]))
    return torch.cat(outputs, 2)


def held(points: int = 64) -> list[dict[str, Any]]:
    """The most tokens and points that are held at any time up to n tokens, with parts of 64 points."""
    rows = []
    for power in range(9, 21):
        # Just before a block joins the sample most is held.
        counts = range(WINDOW, (1 << power) + 1, 2 * points)
        most = {each: max(sum(held_after(count + 2 * points - 1, points, WINDOW, 0, each)) for count in counts)
                for each in SCHEDULES}  # fmt: skip
        rows.append({"n": 1 << power, "points": points, **most})
    return rows


def logs(row: dict[str, Any], kind: str) -> list[list[float]]:
    """Logarithms of an error by seed and points, of points up to n / 32."""
    short = sum(points <= row["n"] // 32 for points in row["points"])
    return [[math.log(value) for value in seed[:short]] for seed in zip(*row[kind], strict=True)]


def exponents(row: dict[str, Any], kind: str) -> list[float]:
    """Of an error in the points, by seed."""
    points = [math.log(points) for points in row["points"]]
    return [statistics.linear_regression(points[: len(seed)], seed).slope for seed in logs(row, kind)]


def at_equal_memory(reduce: dict[str, Any], express: dict[str, Any]) -> list[float]:
    """The error of `express` over that of `reduce` where both hold as much, by the latter's fit: a mean by seed."""
    held = [[math.log(each) for each in row["held"]] for row in (reduce, express)]
    ratios = []
    for one, other in zip(logs(reduce, "relative"), logs(express, "relative"), strict=True):
        fit = statistics.linear_regression(held[0][: len(one)], one)
        off = [value - fit.intercept - fit.slope * size for value, size in zip(other, held[1][: len(one)], strict=True)]
        ratios.append(math.exp(statistics.mean(off)))
    return ratios


def show(rows: list[dict[str, Any]], lengths: list[int]) -> None:
    """Errors and exponents at the longest length, errors by length with 64 points, and what is held."""
    console, shown = Console(width=150), [str(each) for each in POINTS]
    table = Table(
        "data", "schedule", "rule", *shown, "exponent", "of the worst", title=f"relative error, n = {lengths[-1]:,}"
    )
    for row in rows:
        if row["n"] == lengths[-1]:
            means = (f"{statistics.mean(each):.3f}" for each in row["relative"])
            slopes = (spread(exponents(row, kind)) for kind in ("relative", "worst"))
            table.add_row(row["data"], row["schedule"], row["rule"], *means, *slopes)
    console.print(table)
    by = {(row["data"], row["schedule"], row["rule"], row["n"]): row for row in rows}
    columns = [f"n = {length:,}" for length in lengths]
    table = Table(
        "data", "schedule", "rule", *columns, title="relative error with 64 points, and points and tokens held"
    )
    place = POINTS.index(64)
    for key in itertools.product(DATA, SCHEDULES, RULES):
        its = [by[*key, length] for length in lengths]
        table.add_row(*key, *(f"{spread(row['relative'][place])}, {row['held'][place]:.0f}" for row in its))
    console.print(table)
    table = Table("data", "rule", *columns, title="error of express over that of reduce at equal memory")
    for data, rule in itertools.product(DATA, RULES[:3]):
        pairs = ([by[data, schedule, rule, length] for schedule in SCHEDULES] for length in lengths)
        table.add_row(data, rule, *(spread(at_equal_memory(*pair)) for pair in pairs))
    console.print(table)
    table = Table("n", *SCHEDULES, title="the most tokens and points held, 64 points, a window of 1")
    for row in held():
        table.add_row(f"{row['n']:,}", *(f"{row[schedule]:,}" for schedule in SCHEDULES))
    console.print(table)


def digits(values: torch.Tensor) -> list[float]:
    """Four significant digits of each."""
    return [float(f"{value:.4g}") for value in values.tolist()]


def spread(values: list[float]) -> str:
    """Mean, and the smallest and largest of the seeds."""
    return f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
