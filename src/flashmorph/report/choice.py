"""The plan, its search, and its rank among all plans."""

from flashmorph.plan import FULL, Plan
from flashmorph.plan.plan import in_short
from flashmorph.records import Figures
from flashmorph.report.charts import Chart, Dots, Heat, Lines, Panel, Series
from flashmorph.report.looks import QUIET, Look, colour
from flashmorph.report.source import Source
from flashmorph.selection import STRATEGIES

_MOST_STEPS = 300
_FLOOR = 1e-4


def tips(source: Source) -> dict[str, str]:
    """By group: what the search ranked it by, and how near its branch came to its attention."""
    by_group = {}
    errors = source.align.get("errors", [])
    for row, group in enumerate(source.plan.assignments):
        text = f", score {source.plan.scores[row][FULL]:.3g}" if source.plan.scores else ""
        by_group[group] = text + (f", error of the aligned branch {errors[group.layer]:.2f}" if errors else "")
    return by_group


def heads(source: Source) -> Chart | None:
    """The plan, and the scores that it was made by, as layers and key-value heads."""
    plan = source.plan
    if not plan.has_heads:
        return None
    layers = sorted({group.layer for group in plan.assignments})
    rows = sorted({group.kv_head or 0 for group in plan.assignments})
    cell_of = {(group.kv_head or 0, group.layer): number for number, group in enumerate(plan.assignments)}
    options, about = list(plan.assignments.values()), tips(source)
    groups = list(plan.assignments)

    def panel(title: str, values: list[float]) -> Heat:
        """Percent, head by head."""
        cells = [[cell_of.get((head, layer)) for layer in layers] for head in rows]
        return Heat(
            title,
            "layer",
            "key-value head",
            list(map(str, layers)),
            list(map(str, rows)),
            [[None if cell is None else values[cell] for cell in row] for row in cells],
            [
                ["" if cell is None else f"{groups[cell]}: {options[cell]}{about[groups[cell]]}" for cell in row]
                for row in cells
            ],
        )

    panels: list[Panel] = [panel("100 = stays full", [100.0 * (option == FULL) for option in options])]
    if plan.scores:
        worth = _worth(plan)
        least, span = min(worth), max(max(worth) - min(worth), 1e-12)
        panels.append(panel("score of staying full, 100 = highest", [100 * (each - least) / span for each in worth]))
    note = f"Each column is a layer, each row a key-value head with its queries; scores are those of {plan.strategy}."
    return Chart("heads", "The plan, head by head", note, panels)


def scores(source: Source) -> Chart | None:
    """The scores of the search."""
    plan = source.plan
    if not plan.scores or plan.has_heads:
        return None
    groups = list(plan.assignments)
    values = _worth(plan)
    series = []
    for name, kept, look in (
        ("stays full", True, Look(colour(0), line=False)),
        ("gets a mixer", False, Look(QUIET, line=False)),
    ):
        rows = [row for row, group in enumerate(groups) if (plan.assignments[group] == FULL) == kept]
        series.append(Series(name, [values[row] for row in rows], rows, look))
    numbers = [str(number) for number in range(len(groups))]
    panel = Dots("", "score of staying full", "layer", numbers, series)
    return Chart("scores", "What the choice was made by", f"The score that {plan.strategy} gives each layer.", [panel])


def gates(source: Source) -> Chart | None:
    """Gates over the steps of a search that follows gradients; races and other searches have none."""
    entries = [entry for entry in source.trace if "logits" in entry]
    if not entries:
        return None
    thinned = entries[:: max(1, len(entries) // _MOST_STEPS)]
    if thinned[-1] is not entries[-1]:
        thinned.append(entries[-1])
    steps = [entry["step"] for entry in thinned]
    plan = source.plan
    names = [f"{plan.unit.removesuffix('s')} {group.removeprefix('layers.')}" for group in plan.assignments]
    names = [name.replace(".kv_heads.", ".") for name in names]
    kept = [number for number, option in enumerate(plan.assignments.values()) if option == FULL]
    others = [number for number in range(len(names)) if number not in kept]
    series = []
    for number in [*others, *kept]:
        index = kept.index(number) if number in kept else None
        look = Look(QUIET if index is None else colour(index), mark=None)
        name = names[number] if index is not None else f"other {plan.unit}"
        values = [entry["logits"][number] for entry in thinned]
        series.append(Series(name, steps, values, look, hover=[names[number]] * len(steps)))
    known = STRATEGIES.get(source.plan.strategy)
    y_label = known.gate_label if known else "logit"
    note = f"{len(entries)} steps of {source.plan.strategy}; coloured {plan.unit} stay full."
    return Chart("gates", "Gates over time", note, [Lines("", "step of the search", y_label, series)])


def regret(source: Source) -> Chart | None:
    """Regret against what a search cost, by budget, where `compare` ran."""
    if not source.compared:
        return None
    rows = [row for row in source.compared["rows"] if row["regret"] is not None]
    names = sorted({row["strategy"] for row in rows})
    panels = []
    for budget, truth in source.compared["truths"].items():
        known = truth.get("best_known")
        here = [row for row in rows if row["budget"] == budget]
        spent = [row["flops"] for row in here if row["flops"]] or [1.0]
        series = [
            _regrets(name, colour(index), some, (min(spent), max(spent)), 0.0 if known else _FLOOR)
            for index, name in enumerate(names)
            if (some := sorted((row for row in here if row["strategy"] == name), key=lambda row: row["flops"]))
        ]
        if known:
            # The regret may be negative.
            title, y_label = f"budget {budget}: best known {in_short(known)}", "regret, nats a token"
        else:
            title = f"budget {budget}: {truth['plans']} plans, best {in_short(truth['best'])}"
            y_label = f"regret + {_FLOOR:g}, nats a token"
        panels.append(Lines(title, "search cost, FLOPs", y_label, series, log_x=True, log_y=not known))
    found = any(truth.get("best_known") for truth in source.compared["truths"].values())
    against = "best known plan" if found else "best plan"
    note = (
        f"Loss of each strategy's plan minus the {against}'s, mean over seeds, before distillation, on questions that "
        "no search has seen. Dashed: strategies that search nothing."
    )
    title = f"The choice against {'the best known plan' if found else 'all plans'}"
    return Chart("regret", title, note, panels) if panels else None


def _worth(plan: Plan) -> list[float]:
    """`Space.worth` of the scores in a plan's file."""
    return [row[FULL] - max(score for option, score in row.items() if option != FULL) for row in plan.scores]


def _regrets(name: str, shade: str, rows: list[Figures], ends: tuple[float, float], floor: float) -> Series:
    about = []
    for row in rows:
        spread = f" ± {row['regret_spread']:.4f}" if row["regret_spread"] else ""
        rank = "" if row["rank"] is None else f", rank {row['rank']:.1f}"
        about.append(f"{name}: regret {row['regret']:.4f}{spread}{rank}, {row['seeds']} seeds")
    values = [row["regret"] + floor for row in rows]
    if not rows[-1]["flops"]:
        return Series(name, list(ends), [values[-1]] * 2, Look(shade, None, dashed=True), hover=[about[-1]] * 2)
    return Series(name, [row["flops"] for row in rows], values, Look(shade), hover=about)
