"""The time of a built plan, where the budget is in milliseconds: measured beside the teacher, or by the costs alone."""

from pathlib import Path

import torch

from flashmorph.bench import BenchSettings, Timing, source_here, spread, time_tokens, timing_in_words
from flashmorph.convert.load import load_model
from flashmorph.inputs.shapes import Finite, Shape, require_shape
from flashmorph.plan import Costs, Plan
from flashmorph.progress import Report
from flashmorph.records import Figures
from flashmorph.run.folder import Stage
from flashmorph.run.run import Run

_REPEATS = 10


class _Spread(Shape):
    median: Finite
    quartiles: list[Finite]


class _Timed(Shape):
    """What the record of `timing` has beside others'."""

    milliseconds: dict[str, _Spread]


def run_timing(run: Run, host: Stage, built: Stage, plan: Plan) -> Timing | None:
    """The time of a token of the built plan, said on the screen; None where the budget is in no milliseconds.

    Measured, as a stage, where the costs were measured on this device, in their dtype and at their context. Sharded
    weights are not timed.
    """
    budget = run.budget()
    costs = budget.costs
    if not costs:
        return None
    dtype, times = getattr(torch, costs.source["dtype"], None), {}
    if isinstance(dtype, torch.dtype) and source_here(run.device, dtype) == costs.source and not run.shards:
        times = _measured(run, host, built, costs, dtype)
    known = set(plan.assignments) == set(costs.groups)
    timing = Timing(
        context=costs.context,
        limit=budget.limit / 1000,
        by_costs=costs.of(plan.assignments) / 1000 if known else None,
        origin=costs.origin,
        hybrid=times.get("hybrid"),
        teacher=times.get("teacher"),
    )
    run.screen.say(timing_in_words(timing))
    return timing


def _measured(run: Run, host: Stage, built: Stage, costs: Costs, dtype: torch.dtype) -> dict[str, float]:
    """The medians of the teacher and the hybrid, in milliseconds."""
    settings = BenchSettings(lengths=(costs.context,), repeats=_REPEATS)

    def work(folder: Path, report: Report) -> Figures:
        stages = {"teacher": host, "hybrid": built}
        models = {name: load_model(stage.folder / "model", dtype, run.device) for name, stage in stages.items()}
        seconds = time_tokens(models, settings, report)
        spreads = {name: spread([1e3 * each for each in tries]) for name, tries in seconds.items()}
        summary = ", ".join(f"{name} {each['median']:,.3f} ms" for name, each in spreads.items())
        return {"milliseconds": spreads, "summary": summary}

    about = f"a token after {costs.context:,}, in turns"
    wanted = {"source": dict(costs.source), **settings.model_dump(mode="json")}
    stage = run.stage("timing", about, wanted, [host.digest, built.digest], work, alone=True)
    require_shape(stage.record, _Timed, str(stage.folder / "stage.json"))
    return {name: each["median"] for name, each in stage.record["milliseconds"].items()}
