"""Regret after training: the same short distillation for several plans."""

from collections.abc import Sequence
from pathlib import Path

from flashmorph.model.morphable import Morphable
from flashmorph.plan import Plan
from flashmorph.records import Figures
from flashmorph.referee.cells import Cell
from flashmorph.referee.reference import Reference
from flashmorph.run.models import open_objective
from flashmorph.run.run import Run
from flashmorph.selection.searchdata import SearchSettings


def after_distillation(
    run: Run,
    morphable: Morphable,
    cells: Sequence[Cell],
    truth: Reference,
    steps: int,
    search: SearchSettings,
    work: Path,
) -> list[Figures]:
    """Distill the reference's plan and the plan of each strategy in `cells` (of seed 0) for a few steps each.

    Args:
        run: Recipe, teacher and device.
        morphable: The host with its aligned branches.
        cells: Results of the strategies.
        truth: The reference of the budget.
        steps: Optimiser steps of each distillation.
        search: Sizes of the referee's questions.
        work: Where finished distillations are kept.

    Returns:
        One entry per plan, the reference's first. `loss` is the mean answer loss on the referee's
        questions after distillation in nats, `regret` that loss minus the first entry's, `text_loss` the loss on the
        referee's text.
    """
    budget = truth.plan.budget
    plans: dict[str, Plan] = {truth.name: truth.plan}
    for cell in cells:
        if (cell.budget, cell.seed, cell.spend) == (str(budget), 0, 1.0):
            plans[cell.strategy] = Plan(cell.assignments, budget)
    rows = []
    with run.screen.stage("distill", f"{len(plans)} plans, {steps} steps") as report:
        objective = open_objective(
            run, morphable, work, search, "referee", evaluations=work, needs_text=True, needs_training=True
        )
        for number, (name, plan) in enumerate(plans.items(), 1):
            trained = objective.distill([plan], steps, answers=True)
            rows.append(
                {
                    "strategy": name,
                    "budget": str(budget),
                    "steps": steps,
                    "assignments": plan.assignments,
                    "loss_before": truth.loss(plan),
                    "loss": float(trained.losses.mean()),
                    "text_loss": trained.text_loss,
                    "kl": trained.kl,
                }
            )
            report(number, len(plans))
    return [{**row, "regret": row["loss"] - rows[0]["loss"]} for row in rows]
