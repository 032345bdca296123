"""Causal intervention: keep what carries the answer from the facts to where it is written.

HydraHead's rule (arXiv 2606.20097, section 4.2, equations 9 to 12), on layers or key-value heads: receiver and sender
effects by activation patching on counterfactual pairs, times the share of pairs in which an effect is seen, min-max
scaled for each task and averaged over tasks. It scores the attention that the teacher has, and knows nothing of the
mixers; an audit of the method found that one probe misleads, so tasks are the probes here, and groups can be named
that stay full in any case.
"""

from typing import Annotated

import numpy as np
from pydantic import Field

from flashmorph.errors import UserError, quoted
from flashmorph.plan import FULL, Space
from flashmorph.selection.strategy import Search, Selection, Strategy, group_scores

SEEN = 0.01
"""The effect from which on a group counts as one with signal (equation 11)."""


def intervention(
    search: Search,
    pairs: Annotated[int, Field(ge=1, le=1_000)] = 6,
    rounds: Annotated[int, Field(ge=0, le=100)] = 2,
    every_layer: bool = False,
    keep: str = "",
) -> Selection:
    """Keep the layers or heads whose output carries the answer, by patching activations (HydraHead).

    `pairs` counterfactual pairs of each task are asked. Senders are looked for in `rounds`: first those that feed
    receivers, then those that feed these. With `every_layer` one head of each layer stays full ("constrained global
    screening"). `keep` names what stays full in any case, `3` a layer and `5.1` a head of one, with commas. Groups of
    equal score, most have none, are spread over the layers.

    Raises:
        UserError: see `Space.limit`; `keep` names what there is not; or the budget is smaller than what must stay full.
    """
    space, budget = search.space, search.budget
    limit = space.limit(budget)
    wanted = _named(space, keep)
    receivers = search.objective.effects(len(space.groups), pairs, "receiver", (), search.report)
    senders = np.where(np.isnan(receivers), np.nan, 0.0)
    found: set[int] = set(np.flatnonzero(_mean(receivers).max(0) >= SEEN).tolist())
    for _ in range(rounds):
        if not found:
            break
        sent = search.objective.effects(len(space.groups), pairs, "sender", sorted(found), search.report)
        senders = np.fmax(senders, sent)
        more = set(np.flatnonzero(_mean(senders).max(0) >= SEEN).tolist()) - found
        if not more:
            break
        found |= more
    values = fused(receivers, senders)
    seen = int((values > 0).sum())
    unit = "heads" if space.has_heads else "layers"
    search.say(f"intervention: {seen} of {len(values)} {unit} have an effect; others are spread over the layers")
    values = values + _spread(space, values)
    if every_layer:
        wanted |= {max(rows, key=lambda row: (row in wanted, values[row])) for rows in space.layers}
    full = space.options.index(FULL)
    spent = sum(space.cost[row, full] - space.cost[row].min() for row in wanted) + space.cost.min(1).sum()
    if spent > limit:
        raise UserError(f"strategy intervention: {len(wanted)} {unit} must stay full, more than budget {budget} has")
    scores = group_scores(space, [value + 2.0 * (row in wanted) * len(values) for row, value in enumerate(values)])
    trace = [
        {"task": task, "receiver": _mean(receivers)[task].tolist(), "sender": _mean(senders)[task].tolist()}
        for task in range(len(receivers))
    ]
    return Selection(space.best(scores, budget), scores, trace, search.objective.cost)


def fused(receivers: np.ndarray, senders: np.ndarray) -> np.ndarray:
    """One value a group, between 0 and 1, from effects `[tasks, pairs, groups]` (equations 11 and 12).

    A pair that measures nothing is NaN in both.
    """
    either = np.fmax(receivers, senders)
    usable = np.maximum((~np.isnan(either)).sum(1), 1)
    prevalence = (np.nan_to_num(either) >= SEEN).sum(1) / usable
    values = np.fmax(_mean(receivers), _mean(senders)) * prevalence
    least, most = values.min(1, keepdims=True), values.max(1, keepdims=True)
    return ((values - least) / np.where(most > least, most - least, 1.0)).mean(0)


def _mean(effects: np.ndarray) -> np.ndarray:
    """Over the pairs that measure something, `[tasks, groups]`."""
    return np.nan_to_num(effects).sum(1) / np.maximum((~np.isnan(effects)).sum(1), 1)


def _spread(space: Space, values: np.ndarray) -> np.ndarray:
    """Something for groups without an effect, smaller than any effect: first one in each layer, far from each other."""
    order = []
    for layer, rows in enumerate(space.layers):
        empty = [row for row in rows if values[row] <= 0]
        have = len(rows) - len(empty)
        order += [(rank, _bits_reversed(layer), row) for rank, row in enumerate(empty, have)]
    extra = np.zeros(len(values))
    for rank, (_, _, row) in enumerate(sorted(order)):
        extra[row] = (len(order) - rank) / max(1, len(order))
    positive = values[values > 0]
    return extra * (0.5 * positive.min() if len(positive) else 1.0)


def _bits_reversed(layer: int) -> int:
    return int(f"{layer:016b}"[::-1], 2)


def _named(space: Space, keep: str) -> set[int]:
    """The rows of what `keep` names."""
    rows: set[int] = set()
    for name in filter(None, (part.strip() for part in keep.split(","))):
        layer, _, head = name.partition(".")
        group = f"layers.{layer}.kv_heads.{head}" if head else f"layers.{layer}"
        own = [row for row, each in enumerate(space.groups) if each == group or each.startswith(f"{group}.")]
        if not own:
            raise UserError(
                f"strategy intervention: keep has {quoted(name)}, which is none of {space.groups[0]} to "
                f"{space.groups[-1]}; say 3 for a layer, 5.1 for a head of one"
            )
        rows.update(own)
    return rows


INTERVENTION = Strategy(intervention, reuse="scores", patches=True)
