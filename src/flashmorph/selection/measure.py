"""What strategies that go from plan to plan share: the questions they ask, and the losses of plans."""

from collections.abc import Sequence

from flashmorph.plan import Plan
from flashmorph.selection.strategy import Objective


def first_questions(objective: Objective, num_questions: int | None) -> range:
    """The first `num_questions` of the search-validation split, or all of them (None, or more than there are)."""
    return range(min(num_questions or objective.num_questions, objective.num_questions))


def mean_losses(
    objective: Objective, plans: Sequence[Plan], questions: Sequence[int], trace: list[dict], total: int
) -> list[float]:
    """Mean answer loss in nats of each of `plans` over `questions`.

    Every plan becomes one entry of `trace`; `total` is how many entries there will be when the search ends.
    """
    before = len(trace)

    def report(share: float) -> None:
        objective.progress(before + share * len(plans), total)

    losses = objective.evaluate(plans, questions, report).mean(1).tolist()
    trace += [{"assignments": plan.assignments, "loss": loss} for plan, loss in zip(plans, losses, strict=True)]
    objective.progress(len(trace), total, loss=min(losses))
    return losses
