"""The time of a plan whose budget is in milliseconds, as figures and in words (docs/decisions/0033)."""

from typing import TypedDict


class Timing(TypedDict):
    """Milliseconds of a token after `context` others: the budget's limit, by the costs (`origin` says where they are
    from), and as measured, the median of the built plan and of the teacher; None where it was not measured, or where
    the costs are those of other groups than the plan's."""

    context: int
    limit: float
    by_costs: float | None
    origin: str
    hybrid: float | None
    teacher: float | None


def timing_in_words(timing: Timing) -> str:
    """A sentence on the time of a plan, and whether that is above the budget."""
    limit, by_costs, hybrid = timing["limit"], timing["by_costs"], timing["hybrid"]
    about = f"a token after {timing['context']:,} others"
    expected = "" if by_costs is None else f"{by_costs:,.3f} ms by the costs ({timing['origin']})"
    if hybrid is None:
        return f"{about}, not timed here, takes {expected or 'a time that the costs do not say'} of {limit:,.3f} ms"
    verdict = "above" if hybrid > limit else "within"
    beside = f"; the teacher takes {timing['teacher']:,.3f} ms" + (f", this plan {expected}" if expected else "")
    return f"{about} takes {hybrid:,.3f} ms, {verdict} the budget of {limit:,.3f} ms{beside}"
