"""What a strategy is given, what it returns, and what there is to know of it. A strategy never sees a model.

def my_strategy(search, **settings) -> Selection

MY_STRATEGY = Strategy(my_strategy)

What stands in a strategy's signature behind `search` are its settings. Their annotations say what they may be, with the
range (`Steps`); `search.own_settings` holds what a user gives against them, so a strategy does not.
"""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal, NamedTuple, Protocol, cast

import numpy as np
import torch
from pydantic import BeforeValidator, Field

from flashmorph.plan import FULL, Budget, Plan, Space
from flashmorph.progress import Report, silent
from flashmorph.records import Figures

Steps = Annotated[int, Field(ge=1, le=100_000)]
"""Updates of a search, or of one short distillation."""
NumQuestions = Annotated[int, Field(ge=1, le=1_000_000)] | None
"""How many questions of the search-validation split are asked, from the first on; None for all."""
_LOG = logging.getLogger(__name__)


def _of_percent(value: Any) -> Any:
    """`1%` as 0.01."""
    is_percent = isinstance(value, str) and re.fullmatch(r"\s*\d+(\.\d+)?\s*%\s*", value)
    return float(value.strip().removesuffix("%")) / 100 if is_percent else value


Share = Annotated[float, Field(gt=0, le=10), BeforeValidator(_of_percent)]
"""A share, as 0.01 or 1%."""


@dataclass
class Cost:
    """What a search spent: tokens through the morphable model, estimated FLOPs and seconds."""

    tokens_forward: int = 0
    tokens_backward: int = 0
    flops: float = 0.0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, float]:
        """The JSON form."""
        return asdict(self)


@dataclass(frozen=True)
class Distilled:
    """A plan after a short distillation: `kl` to the teacher in nats a token (mean of the last quarter of the steps),
    `text_loss` in nats a token, and the answer loss of each question, `[questions]`, or none where it was not asked."""

    kl: float
    text_loss: float
    losses: np.ndarray


EACH_TASK = "each task"


class Objective(Protocol):
    """The loss of gates and plans, as a strategy sees it.

    `num_questions` is the size of the search-validation split, in which `num_tasks` tasks take turns.
    """

    num_questions: int
    num_tasks: int

    @property
    def cost(self) -> Cost:
        """What was spent so far."""
        ...

    def gradient(
        self, gates: torch.Tensor, step: int, loss: str, data: str = "questions"
    ) -> tuple[float, torch.Tensor]:
        """Loss of `gates` `[groups, options]` on the search-train batch number `step`, and its gradient in them.

        `loss` is `answers` (cross-entropy of the answer tokens) or `hidden` (the published distance of hidden states
        at the answer tokens to the teacher's). With `data` `text` the batch is text alone, and every token counts as
        an answer; with `EACH_TASK` it has a question of each task at least, also where one row is as long as a batch.
        Equal on every rank.
        """
        ...

    def evaluate(
        self,
        plans: Sequence[Plan],
        questions: Sequence[int] | None = None,
        report: Callable[[float], None] | None = None,
    ) -> np.ndarray:
        """Mean answer cross-entropy `[plans, questions]` of plans on search-validation `questions` (all by default).

        Plans are cheapest together: layers that they share from the first one up are computed once. `report` is called
        with the share that is done.
        """
        ...

    def effects(
        self, groups: int, pairs: int, kind: Literal["receiver", "sender"], receivers: Sequence[int], report: Report
    ) -> np.ndarray:
        """Effects of each group's output on the answer, `[tasks, pairs, groups]`, by patching (`effects.py`).

        `pairs` counterfactual pairs of each task; NaN where one measures nothing. `receivers` are the numbers of the
        groups that senders send to.

        Raises:
            UserError: no pair of some task can be made.
        """
        ...

    def text_losses(self, plans: Sequence[Plan], report: Callable[[float], None] | None = None) -> list[float]:
        """Mean next-token cross-entropy of each plan, in nats, on the text of the search-validation split.

        Plans are cheapest together; see `evaluate`.

        Raises:
            UserError: the objective was made without text.
        """
        ...

    def distill(self, path: Sequence[Plan], steps: int, answers: bool = False) -> Distilled:
        """What the last plan of `path` can do when each plan in turn has been distilled for `steps` steps.

        Questions are asked where `answers` are wanted.

        Raises:
            UserError: the objective cannot train.
        """
        ...

    def resume(self, cost: Cost) -> None:
        """Go on counting from the cost of an interrupted search."""
        ...


class State(Protocol):
    """Where a search that follows gradients keeps its state, so that an interrupted one can go on."""

    def restore(
        self, logits: torch.Tensor, optimizer: torch.optim.Optimizer, trace: list[Figures]
    ) -> tuple[int, Cost] | None:
        """Fill in the state that was kept: the step to go on with, and the cost so far. None: there is no state."""
        ...

    def keep(
        self, step: int, logits: torch.Tensor, optimizer: torch.optim.Optimizer, trace: list[Figures], cost: Cost
    ) -> None:
        """Keep the state after `step` steps."""
        ...


class Asked(Exception):
    """A strategy asked an `Unasked` objective."""


class Unasked:
    """The objective of strategies that search nothing; `Asked` is raised where one is asked after all.

    A strategy that is started with it refuses wrong spaces, budgets and settings, or raises `Asked`.
    """

    def __init__(self, num_questions: int = 0):
        self.num_questions = num_questions

    def __getattr__(self, name: str) -> Any:
        raise Asked


@dataclass(frozen=True)
class Search:
    """What a strategy is given: the plans that it may choose from, the losses that it may ask for, and whom to inform.

    Everything random comes from `seed`. `report` takes the progress, `say` what the user should know before much is
    spent. Without `state` an interrupted search begins anew.
    """

    space: Space
    budget: Budget
    objective: Objective = field(default_factory=lambda: cast(Objective, Unasked()))
    seed: int = 0
    report: Report = silent
    say: Callable[[str], None] = _LOG.warning
    state: State | None = None


@dataclass(frozen=True)
class Selection:
    """The result of a search.

    `scores` is `[groups, options]`, what the plan was cut from; `trace` keeps what a plot needs (gates over steps, or
    the losses of the plans tried); `cost` is what was spent.
    """

    plan: Plan
    scores: np.ndarray
    trace: list[Figures] = field(default_factory=list)
    cost: Cost = field(default_factory=Cost)


class Swaps(NamedTuple):
    """The races at the end of a search: at most `rounds`, each of the plan against `candidates` others."""

    rounds: int = 0
    candidates: int = 0


Reuse = Literal["nothing", "state", "scores", "order"]
"""What searches for several budgets share: their state but for the last check, the scores, which are cut at every
budget, or the order of choice, which holds the plans of all."""


@dataclass(frozen=True)
class Strategy:
    """A way to choose, and all that the rest of the package needs to know of it.

    `run(search, **settings)` searches. `reuse` may depend on the settings; an order comes from
    the search for the `most` or the `least` full layers, under `order_settings`. A strategy that `searches` nothing
    asks the model nothing; one that `asks_questions` chooses by the answers to questions (with the setting `data` at
    `text` none does). `needs_text` and `needs_training` are for those that weigh text or train weights.
    `gradient_loss` is the loss whose gradient is asked for, one batch in each of `steps`; `gate_label` what their
    gates are in a picture. `swaps(settings)` are the races at its end. What is not
    `seeded` gives the same for every seed. `two_options`: it cannot choose among more. `finds_budget`: the number of
    full layers is what it finds. `patches`: it replaces activations
    inside of the model, which must be whole. `enumerates`: it evaluates every plan of the budget.
    """

    run: Callable[..., Selection]
    reuse: Reuse | Callable[[Mapping[str, Any]], Reuse] = "nothing"
    order_from: Literal["most", "least"] = "most"
    order_settings: Mapping[str, Any] = field(default_factory=dict)
    searches: bool = True
    asks_questions: bool = True
    needs_text: bool = False
    needs_training: bool = False
    gradient_loss: Literal["answers", "hidden"] | None = None
    gate_label: str = "logit, full minus other"
    swaps: Callable[[Mapping[str, Any]], Swaps] = lambda settings: Swaps()
    seeded: bool = True
    two_options: bool = False
    finds_budget: bool = False
    patches: bool = False
    enumerates: bool = False


def layer_scores(space: Space, values: Sequence[float]) -> np.ndarray:
    """Scores `[groups, options]` from one value a layer: what `full` is worth to each of its groups."""
    return group_scores(space, [values[group.layer] for group in space.groups])


def group_scores(space: Space, values: Sequence[float], option: str = FULL) -> np.ndarray:
    """Scores `[groups, options]` from one value a group: what `option` is worth there, every other option 0."""
    scores = np.zeros(space.cost.shape)
    scores[:, space.options.index(option)] = values
    return scores
