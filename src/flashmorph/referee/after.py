"""Does the choice still matter once a plan has been trained? The same short distillation for several plans."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashmorph.model.morphable import Morphable
from flashmorph.plan import Plan
from flashmorph.referee.cells import Cell
from flashmorph.referee.truth import Truth
from flashmorph.run.models import open_objective
from flashmorph.run.run import Run
from flashmorph.selection.searchdata import SearchSettings

OPTIMUM = "optimum"


def after_distillation(
    run: Run,
    morphable: Morphable,
    cells: Sequence[Cell],
    truth: Truth,
    steps: int,
    search: SearchSettings,
    work: Path,
) -> list[dict[str, Any]]:
    """One entry for the best plan before distillation, and for the plan of each strategy in `cells` (of seed 0).

    `loss` is the mean answer loss on the referee's questions after `steps` steps, `regret` what it is more than the
    optimum's, `text_loss` that on the referee's text. Finished distillations are kept in `work`.
    """
    budget = truth.best.budget
    plans: dict[str, Plan] = {OPTIMUM: truth.best}
    for cell in cells:
        if (cell.budget, cell.seed, cell.spend) == (str(budget), 0, 1.0):
            plans[cell.strategy] = Plan(cell.assignments, budget)
    rows = []
    with run.screen.stage("distill", f"{len(plans)} plans, {steps} steps") as report:
        objective = open_objective(
            run, morphable, work, search, "referee", evaluations=work, needs_text=True, needs_training=True
        )
        for number, (name, plan) in enumerate(plans.items(), 1):
            found = objective.distill([plan], steps)
            rows.append(
                {
                    "strategy": name,
                    "budget": str(budget),
                    "steps": steps,
                    "assignments": plan.assignments,
                    "loss_before": truth.loss(plan),
                    "loss": float(found.losses.mean()),
                    "text_loss": found.text_loss,
                    "kl": found.kl,
                }
            )
            report(number, len(plans))
    return [{**row, "regret": row["loss"] - rows[0]["loss"]} for row in rows]
