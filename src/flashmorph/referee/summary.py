"""Cells in figures: rank, regret, cost and agreement of each strategy, over seeds."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from flashmorph.plan import FULL
from flashmorph.records import Figures
from flashmorph.referee.cells import Cell
from flashmorph.referee.compare import Comparison


def summarise(comparison: Comparison) -> Figures:
    """compare.json: the reference of each budget, one row for each strategy, budget and spend, and every cell."""
    cells, truths = comparison.cells, comparison.truths
    groups: dict[tuple[str, str, float], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.budget, cell.strategy, cell.spend), []).append(cell)
    return {
        "truths": {name: truth.to_dict() for name, truth in truths.items()},
        "rows": [_row(*key, some) for key, some in sorted(groups.items())],
        "cells": [{name: value for name, value in vars(cell).items() if name != "details"} for cell in cells],
        "after_distillation": comparison.after,
        "tolerance": [{"assignments": cell.assignments, **cell.details} for cell in cells if "trace" in cell.details],
    }


def _row(budget: str, strategy: str, spend: float, cells: list[Cell]) -> Figures:
    regrets = [cell.regret for cell in cells if cell.regret is not None]
    ranks = [cell.rank for cell in cells if cell.rank is not None]
    widths = [cell.half_width for cell in cells if cell.half_width is not None]
    recalls = [cell.recall for cell in cells if cell.recall is not None]
    pairs = combinations([_kept(cell) for cell in cells], 2)
    return {
        "budget": budget,
        "strategy": strategy,
        "spend": spend,
        "seeds": len(cells),
        "rank": _mean(ranks),
        "worst_rank": max(ranks, default=None),
        "first": _mean([rank == 1 for rank in ranks]),
        "regret": _mean(regrets),
        "regret_spread": float(np.std(regrets, ddof=1)) if len(regrets) > 1 else None,
        # Plans of several seeds share their questions, so their mean is hardly known better than one of them.
        "half_width": _mean(widths),
        "recall": _mean(recalls),
        "agreement": _mean([_overlap(one, other) for one, other in pairs]),
        **{name: _mean([cell.cost[name] for cell in cells]) for name in cells[0].cost},
        "plans": [dict(plan) for plan in sorted({tuple(cell.assignments.items()) for cell in cells})],
    }


def _kept(cell: Cell) -> set[str]:
    return {group for group, option in cell.assignments.items() if option == FULL}


def _overlap(one: set[str], other: set[str]) -> float:
    """Intersection over union; of several options a plan may have no full layer."""
    return len(one & other) / len(one | other) if one or other else 1.0


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None
