"""The objective of a search on a morphable model.

Losses are those of `model_losses.py`. Each is counted (`ledger.py`) and kept on disk (`cache.py`). Several processes
run a share of each batch and get the same results: a strategy knows nothing of them.
"""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from flashmorph import distributed
from flashmorph.data.heldout import HeldOut
from flashmorph.errors import UserError
from flashmorph.files import write_json
from flashmorph.model.morphable import Morphable
from flashmorph.plan import Plan
from flashmorph.progress import Report
from flashmorph.selection.cache import (
    DistilledLosses,
    Effects,
    TextLoss,
    keep,
    keep_losses,
    kept,
    kept_here,
    kept_losses,
    key_of,
)
from flashmorph.selection.distilling import Distiller
from flashmorph.selection.ledger import Ledger
from flashmorph.selection.model_losses import ModelLosses
from flashmorph.selection.searchdata import SearchData
from flashmorph.selection.strategy import EACH_TASK, Cost, Distilled

_WRITE_SECONDS = 20
_LOG = logging.getLogger(__name__)


class MorphableObjective:
    """Answers, as `Objective` asks, with the model's losses on retrieval questions."""

    def __init__(
        self,
        morphable: Morphable,
        data: SearchData,
        folder: Path,
        bf16: bool = False,
        text: HeldOut | None = None,
        distiller: Distiller | None = None,
        evaluations: Path | None = None,
        say: Callable[[str], None] = _LOG.warning,
    ):
        """The losses of `morphable` on the questions of `data`.

        Args:
            morphable: The host with its branches.
            data: Questions of the splits search-train and search-validation.
            folder: The search's own.
            bf16: Whether products run in bfloat16.
            text: Validation text, for the strategies that weigh text too.
            distiller: For the strategies that train weights.
            evaluations: Where losses of plans are kept; by default a folder inside `folder`.
            say: Called where a file is damaged and its loss is measured again.
        """
        self._losses = ModelLosses(morphable, data, text, bf16)
        self._ledger = Ledger(morphable)
        self._data, self._text, self._distiller = data, text, distiller
        self._evaluations, self._say = evaluations or folder / "evaluations", say
        self.num_questions, self.num_tasks = data.settings.questions, data.num_tasks

    @property
    def cost(self) -> Cost:
        """What was spent so far. An evaluation that is read from disk counts as if it were run here."""
        return self._ledger.cost

    def gradient(
        self, gates: torch.Tensor, step: int, loss: str, data: str = "questions"
    ) -> tuple[float, torch.Tensor]:
        """Loss and gradient on the search-train batch number `step`; see `Objective`."""
        batch = self._data.text_batch(step) if data == "text" else self._data.batch(step, data == EACH_TASK)
        for part in self._data.micro_batches(batch, len(batch[0].input_ids)):
            self._ledger.gradient(part, loss)
        return self._losses.gradient(gates, batch, loss)

    def evaluate(
        self,
        plans: Sequence[Plan],
        questions: Sequence[int] | None = None,
        report: Callable[[float], None] | None = None,
    ) -> np.ndarray:
        """Mean answer cross-entropy `[plans, questions]`; losses known before are read from disk.

        Raises:
            UserError: a loss is not finite.
        """
        wanted = list(range(self.num_questions) if questions is None else questions)
        keys, gates = [key_of(plan.assignments) for plan in plans], self._losses.hard_gates(plans)
        known = kept_losses(self._evaluations, plans, self._say)
        rounds = distributed.rounds(self._data.micro_batches(wanted))
        unwritten: set[int] = set()
        written_at = time.perf_counter()
        try:
            for number, together in enumerate(rounds, 1):
                for part, counts in together:
                    if counts:
                        self._ledger.plans(keys, gates, part, self._data.settings.longest)
                asked = {question for part, _ in together for question in part}
                missing = [index for index in range(len(plans)) if not known[index].keys() >= asked]
                if missing:
                    own, _ = together[distributed.rank()]
                    rows = [self._data.questions()[question] for question in own]
                    for index, losses in self._losses.of_plans([plans[index] for index in missing], rows):
                        for found in distributed.gather(dict(zip(own, losses.tolist(), strict=True))):
                            known[missing[index]].update(found)
                    unwritten.update(missing)
                if report:
                    report(number / len(rounds))
                if time.perf_counter() - written_at > _WRITE_SECONDS:
                    self._write_losses(plans, known, unwritten)
                    written_at = time.perf_counter()
        finally:
            self._write_losses(plans, known, unwritten)
        found = np.array([[losses[question] for question in wanted] for losses in known])
        for plan, losses in zip(plans, found, strict=True):
            _check_finite(losses, "answer", plan)
        return found

    def effects(
        self, groups: int, pairs: int, kind: Literal["receiver", "sender"], receivers: Sequence[int], report: Report
    ) -> np.ndarray:
        """Effects `[tasks, pairs, groups]` by patching; see `Objective`. Pairs measured before are read from disk.

        Raises:
            UserError: no pair of some task can be made.
        """
        tasks = self._data.num_tasks
        wanted = [(task, number) for task in range(tasks) for number in range(pairs)]
        found = np.full((tasks, pairs, groups), np.nan)
        for done, together in enumerate(distributed.rounds([[each] for each in wanted]), 1):
            own, counts = together[distributed.rank()]
            measured = {own[0]: self._pair_effects(*own[0], groups, kind, receivers)} if counts else {}
            for index, values in [item for each in distributed.gather(measured) for item in each.items()]:
                if values is not None:
                    found[index] = values
                    self._ledger.effects(kind, values, receivers, self._data.settings.longest)
            report(done, -(-len(wanted) // distributed.count()))
        if empty := [task for task in range(tasks) if np.isnan(found[task]).all()]:
            raise UserError(
                f"strategy intervention: none of {pairs} counterfactual pairs of task number {empty[0] + 1} measures "
                "anything: the teacher hardly prefers the answer, or no other value has as many tokens; leave it out"
            )
        return found

    def _pair_effects(
        self, task: int, number: int, groups: int, kind: str, receivers: Sequence[int]
    ) -> list[float] | None:
        """Effects of one pair; None where it measures nothing."""
        path = self._evaluations / f"{key_of([task, number, groups, kind, list(receivers)])}.effects.json"
        if (known := kept_here(path, self._say, Effects)) is not None:
            return known["effects"]
        values = self._losses.effects(self._data.pair(task, number), groups, None if kind == "receiver" else receivers)
        write_json(path, {"task": task, "pair": number, "kind": kind, "effects": values})
        return values

    def text_losses(self, plans: Sequence[Plan], report: Callable[[float], None] | None = None) -> list[float]:
        """Mean next-token cross-entropy on the `text`, in nats; plans evaluated before are read from disk.

        Raises:
            UserError: there is no `text`, or a loss is not finite.
        """
        keys, text = [key_of(plan.assignments) for plan in plans], self._text_to_weigh()
        self._ledger.texts(keys, self._losses.hard_gates(plans), text)
        paths = [self._evaluations / f"{key}.text.json" for key in keys]
        known = {key: kept(path, self._say, TextLoss) for key, path in zip(keys, paths, strict=True)}
        new = {key: index for index, key in enumerate(keys) if known[key] is None}
        if new:
            losses = self._losses.text_of_plans([plans[index] for index in new.values()], report)
            for (key, index), loss in zip(new.items(), losses, strict=True):
                _check_finite(loss, "text", plans[index])
                known[key] = {"assignments": plans[index].assignments, "text_loss": loss}
                keep(paths[index], known[key])
        return [known[key]["text_loss"] for key in keys]

    def distill(self, path: Sequence[Plan], steps: int, answers: bool = False) -> Distilled:
        """What the last plan of `path` can do when each plan in turn has been distilled for `steps` steps.

        Questions are asked where `answers` are wanted.

        Raises:
            UserError: the objective was made without a distiller or without text, or a loss is not finite.
        """
        if self._distiller is None:
            raise UserError("this strategy trains weights: give the objective a distiller")
        self._text_to_weigh()
        about = [plan.assignments for plan in path]
        settings = self._distiller.settings_for(steps)
        self._ledger.distilled(path, settings, steps)
        key = key_of([about, settings.what_counts()])
        file = self._evaluations / f"{key}.distilled.json"
        found = kept(file, self._say, DistilledLosses)
        if found and answers and len(found["losses"]) != self.num_questions:
            found = None
        if found is None:
            model, kl = self._distiller.run(path, steps)
            text, losses = self._losses.of_model(model, answers)
            _check_finite([kl, text, *losses], "distilled", path[-1])
            found = {"path": about, "steps": steps, "kl": kl, "text_loss": text, "losses": losses}
            keep(file, found)
        return Distilled(found["kl"], found["text_loss"], np.array(found["losses"]))

    def resume(self, cost: Cost) -> None:
        """Go on counting from the cost of an interrupted search."""
        self._ledger.resume(cost)

    def _text_to_weigh(self) -> HeldOut:
        if self._text is None:
            raise UserError("this strategy weighs text too: give the objective validation text, `text`")
        return self._text

    def _write_losses(self, plans: Sequence[Plan], known: Sequence[dict[int, float]], unwritten: set[int]) -> None:
        while unwritten:
            index = unwritten.pop()
            keep_losses(self._evaluations, plans[index], known[index])


def _check_finite(losses: Any, kind: str, plan: Plan) -> None:
    if not np.isfinite(losses).all():
        raise UserError(
            f"the {kind} loss of the plan {plan.strip()} is not finite: look at the teacher's and the branches' weights"
        )
