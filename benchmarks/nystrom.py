"""A causal Nystromformer against attention pooled by segment: error against causal softmax (decision 31).

    PYTHONPATH=tests python benchmarks/nystrom.py

Relative error of the last 512 of 1,024 queries, random queries, keys and values of dimension 32 in float64, eight
heads; segments and window of `pooled` are as long as a landmark's.
"""

import torch
from nystrom_reference import nystrom
from rich.console import Console
from rich.table import Table
from torch.nn.functional import scaled_dot_product_attention

from flashmorph.own.pooled_flashmorph import Pooled

HEADS, TOKENS, DIM, LANDMARKS = 8, 1024, 32, (16, 64, 128)


@torch.no_grad()
def main() -> None:
    """Compute and print."""
    drawn = torch.Generator().manual_seed(0)
    table = Table("scale", *(f"{form}, {count}" for form in ("causal Nystrom", "pooled") for count in LANDMARKS))
    late = slice(TOKENS // 2, None)
    for scale in (0.5, 1.0, 2.0):
        q, k, v = (scale * torch.randn(HEADS, TOKENS, DIM, dtype=torch.float64, generator=drawn) for _ in range(3))
        exact = scaled_dot_product_attention(q, k, v, is_causal=True)[:, late]

        def error(output: torch.Tensor, exact: torch.Tensor = exact) -> str:
            return f"{((output[:, late] - exact).norm() / exact.norm()).item():.3g}"

        errors = [error(nystrom(q, k, v, count, causal=True)) for count in LANDMARKS]
        for count in LANDMARKS:
            size = TOKENS // count
            mixer = Pooled(HEADS, 1, DIM, DIM, segment=size, window=size)
            errors.append(error(mixer(q[None], k[None], v[None], q[:1], None, None)[0]))
        table.add_row(str(scale), *errors)
    Console().print(table)


if __name__ == "__main__":
    main()
