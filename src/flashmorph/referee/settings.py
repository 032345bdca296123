"""Settings of a comparison, and what is refused before any work."""

from collections.abc import Callable

from pydantic import Field

from flashmorph.errors import UserError
from flashmorph.inputs.settings import Settings
from flashmorph.referee.best_known import LEAST_QUESTIONS
from flashmorph.referee.reference import ReferenceKind
from flashmorph.selection import BASELINE, DEFAULT_STRATEGY, STRATEGIES


class CompareSettings(Settings):
    """Settings of a comparison.

    A strategy may have settings of its own: `race+confidence=0.8`, `budgeted-gates+steps=50+random_budget=true`.
    """

    budgets: tuple[str, ...] = ("1", "2", "3")
    strategies: tuple[str, ...] = tuple(STRATEGIES)
    seeds: int = Field(default=5, gt=0, description="seeds of the search: its data and its noise")
    spends: tuple[float, ...] = (1.0,)
    questions: int = Field(default=256, gt=0, description="questions of the referee's split")
    recall_questions: int = Field(default=25, ge=0, description="generated answers a task and plan; 0 for none")
    distill_steps: int = Field(default=0, ge=0, description="steps of the distillation that plans are compared after")
    distill_budget: str = "2"
    distilled: tuple[str, ...] = (BASELINE, DEFAULT_STRATEGY)
    reference: ReferenceKind = Field(default="enumerated", description="what plans are judged against")
    max_plans: int = Field(default=2_000, gt=0, description="the most plans that are enumerated")
    reference_tokens: int = Field(
        default=8_000_000, gt=0, description="the most tokens that finding a reference takes, backward ones twice"
    )
    only_kept: bool = Field(default=False, description="show the cells that are there and search for no other")


def for_a_found_reference(settings: CompareSettings, say: Callable[[str], None]) -> CompareSettings:
    """The settings for a reference that is found: of all strategies those that enumerate are left out, which is said.

    Raises:
        UserError: one that enumerates is asked for by its name, or the referee has too few questions.
    """
    if settings.questions < LEAST_QUESTIONS:
        raise UserError(
            f"--reference found judges by {LEAST_QUESTIONS} questions at least and {settings.questions} are given: "
            f"give --questions {LEAST_QUESTIONS} or more"
        )
    names = [label for label in settings.strategies if _enumerates(label)]
    if not names:
        return settings
    if settings.strategies != tuple(STRATEGIES):
        raise UserError(
            f"strategy {names[0]} evaluates every plan, and --reference found is for budgets with too many of them: "
            "leave it out"
        )
    say(f"{', '.join(names)} is left out: it evaluates every plan, and --reference found is for too many of them")
    others = tuple(label for label in settings.strategies if label not in names)
    return settings.model_copy(update={"strategies": others})


def _enumerates(label: str) -> bool:
    name = label.partition("+")[0]
    return name in STRATEGIES and STRATEGIES[name].enumerates
