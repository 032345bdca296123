"""What strategies that go from plan to plan share: the questions they ask, and the losses of plans."""

from collections.abc import Sequence

from flashmorph.plan import Plan
from flashmorph.selection.strategy import Search


def first_questions(search: Search, num_questions: int | None) -> range:
    """The first `num_questions` of the search-validation split, or all of them (None, or more than there are)."""
    there = search.objective.num_questions
    return range(min(num_questions or there, there))


def mean_losses(
    search: Search, plans: Sequence[Plan], questions: Sequence[int], trace: list[dict], total: int
) -> list[float]:
    """Mean answer loss in nats of each of `plans` over `questions`.

    Every plan becomes one entry of `trace`; `total` is how many entries there will be when the search ends.
    """
    before = len(trace)

    def report(share: float) -> None:
        search.report(before + share * len(plans), total)

    losses = search.objective.evaluate(plans, questions, report).mean(1).tolist()
    trace += [{"assignments": plan.assignments, "loss": loss} for plan, loss in zip(plans, losses, strict=True)]
    search.report(len(trace), total, loss=min(losses))
    return losses
