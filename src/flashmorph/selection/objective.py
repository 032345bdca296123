"""The objective of a search on a morphable model: the only part of selection that sees a model.

It runs the model on the batches of `searchdata.py`, counts what was spent, and keeps every evaluated plan and the state
of the search on disk, so that an interrupted search goes on where it stopped. Several processes run a share of each
batch, and all are told the same: a strategy knows nothing of them.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flashmorph import distributed
from flashmorph.data.heldout import HeldOut
from flashmorph.errors import UserError
from flashmorph.losses import Head, label_loss, token_losses
from flashmorph.model.morphable import Morphable, MorphableLayer, run_order
from flashmorph.plan import Plan
from flashmorph.progress import Report, silent
from flashmorph.selection.cache import (
    DistilledLosses,
    SearchState,
    TextLoss,
    keep,
    keep_losses,
    kept,
    kept_losses,
    key_of,
    tensors_of,
)
from flashmorph.selection.distilling import Distiller
from flashmorph.selection.meter import Meter
from flashmorph.selection.searchdata import SearchData
from flashmorph.selection.strategy import Cost, Distilled
from flashmorph.tasks import Example

_STATE_EVERY = 10
_WRITE_SECONDS = 20


class MorphableObjective:
    """Answers, as `Objective` asks, with the model's losses on retrieval questions.

    The answers' loss is everywhere the mean over questions of each question's mean cross-entropy of its answer tokens,
    teacher-forced; neither it nor its gradient depends on how many rows are run at once.
    """

    def __init__(
        self,
        morphable: Morphable,
        data: SearchData,
        folder: Path,
        bf16: bool = False,
        report: Report = silent,
        text: HeldOut | None = None,
        distiller: Distiller | None = None,
        evaluations: Path | None = None,
        say: Callable[[str], None] = print,
    ):
        """`folder` keeps the search's state, `evaluations` the losses of plans (by default a folder inside it).

        `text` is validation text, for the strategies that weigh text too; the `distiller` is for those that train
        weights.
        """
        self._morphable, self._data, self._folder, self._bf16, self._report = morphable, data, folder, bf16, report
        self._text, self._distiller, self._say = text, distiller, say
        self._evaluations = evaluations or folder / "evaluations"
        self._head = Head.of(morphable.model)
        self._meter = Meter(morphable)
        self._asked: set[tuple[str, int]] = set()
        self.num_questions = data.settings.questions

    @property
    def cost(self) -> Cost:
        """What was spent so far. An evaluation that is read from disk counts as if it were run here."""
        return self._meter.look()

    def gradient(
        self, gates: torch.Tensor, step: int, loss: str, data: str = "questions"
    ) -> tuple[float, torch.Tensor]:
        """Loss and gradient on the search-train batch number `step`; see `Objective`.

        Gates lie outside of whatever wraps the model, so their gradient is brought together here.
        """
        run, size = {"answers": (self._answer_loss, len), "hidden": (self._hidden_loss, _answer_tokens)}[loss]
        gates = gates.to(self._morphable.device).requires_grad_(True)
        batch = self._data.batch(step) if data == "questions" else self._data.text_batch(step)
        parts = self._data.micro_batches(batch)
        for part in parts:
            self._count_gradient(part, loss)
        value = 0.0
        for together in distributed.rounds(parts):
            part, counts = together[distributed.rank()]
            with self._autocast():
                share = run(gates, part) * (counts * size(part) / size(batch))
            share.backward()
            value += share.item()
        assert gates.grad is not None
        gradient = distributed.total(gates.grad.cpu())
        return distributed.total(torch.tensor(value, dtype=torch.float64)).item(), gradient

    def evaluate(
        self,
        plans: Sequence[Plan],
        questions: Sequence[int] | None = None,
        report: Callable[[float], None] | None = None,
    ) -> np.ndarray:
        """Mean answer cross-entropy `[plans, questions]`; losses known before are read from disk.

        What plans have in common from the first layer up is computed once (`Morphable.each_plan`).

        Raises:
            UserError: a loss is not finite.
        """
        wanted = list(range(self.num_questions) if questions is None else questions)
        keys = [key_of(plan.assignments) for plan in plans]
        known = kept_losses(self._evaluations, plans, self._say)
        rounds = distributed.rounds(self._data.micro_batches(wanted))
        unwritten: set[int] = set()
        written_at = time.perf_counter()
        try:
            for number, together in enumerate(rounds, 1):
                for part, counts in together:
                    if counts:
                        self._count_plans(plans, keys, part)
                asked = {question for part, _ in together for question in part}
                missing = [place for place in range(len(plans)) if not known[place].keys() >= asked]
                if missing:
                    own, _ = together[distributed.rank()]
                    rows = [self._data.questions()[question] for question in own]
                    for place, losses in self._run_plans([plans[place] for place in missing], rows):
                        for found in distributed.gather(dict(zip(own, losses.tolist(), strict=True))):
                            known[missing[place]].update(found)
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

    @torch.no_grad()
    def text_loss(self, plan: Plan) -> float:
        """Mean next-token cross-entropy on the `text`, in nats; plans evaluated before are read from disk.

        Raises:
            UserError: there is no `text`, or the loss is not finite.
        """
        key = key_of(plan.assignments)
        text = self._text_to_weigh()
        if (key, -1) not in self._asked:
            self._asked.add((key, -1))
            for piece in text.pieces:
                self._meter.count(torch.empty(1, len(piece), device="meta"))
        path = self._evaluations / f"{key}.text.json"
        found = kept(path, self._say, TextLoss)
        if found is None:
            gates = self._hard_gates([plan])[0]
            loss = self._mean_text_loss(lambda ids: self._morphable(ids, gates), self._head)
            _check_finite(loss, "text", plan)
            found = {"assignments": plan.assignments, "text_loss": loss}
            keep(path, found)
        return found["text_loss"]

    def distill(self, path: Sequence[Plan], steps: int) -> Distilled:
        """What the last plan of `path` can do when each plan in turn has been distilled for `steps` steps.

        Raises:
            UserError: the objective was made without a distiller or without text, or a loss is not finite.
        """
        if self._distiller is None:
            raise UserError("this strategy trains weights: give the objective a distiller")
        about = [plan.assignments for plan in path]
        settings = self._distiller.settings_for(steps)
        # Every plan of the path is counted once, by whichever call came first.
        for length in range(1, len(path) + 1):
            counted = (key_of(about[:length]), -2 - steps)
            if counted not in self._asked:
                self._asked.add(counted)
                tokens = torch.empty(settings.steps * settings.batch_rows, settings.length, device="meta")
                self._meter.count(tokens, forward=2, backward=1, weights=1)
        key = key_of([about, settings.what_counts()])
        file = self._evaluations / f"{key}.distilled.json"
        found = kept(file, self._say, DistilledLosses)
        if found and len(found["losses"]) != self.num_questions:
            found = None
        if found is None:
            model, kl = self._distiller.run(path, steps)
            head = Head.of(model)
            with torch.no_grad():
                text = self._mean_text_loss(lambda ids: model.model(ids, use_cache=False).last_hidden_state, head)
                losses = []
                for part in self._data.micro_batches(self._data.questions()):
                    ids, marks = self._tensors(part)
                    with self._autocast():
                        hidden = model.model(ids, use_cache=False).last_hidden_state
                        losses += _question_losses(hidden, head, ids, marks).tolist()
            _check_finite([kl, text, *losses], "distilled", path[-1])
            found = {"path": about, "steps": steps, "kl": kl, "text_loss": text, "losses": losses}
            keep(file, found)
        return Distilled(found["kl"], found["text_loss"], np.array(found["losses"]))

    def restore(self, logits: torch.Tensor, optimizer: torch.optim.Optimizer, trace: list[dict]) -> int:
        """Read the state of an interrupted search, if there is one."""
        path = self._folder / "search_state.json"
        state = kept(path, self._say, SearchState)
        if state is None:
            return 0
        if (found := tensors_of(state, logits.shape)) is None:
            self._say(f"{path} is damaged: it is of another search; making it again")
            return 0
        with torch.no_grad():
            logits.copy_(found.pop("logits"))
        optimizer.state[logits] = found
        trace[:] = state["trace"]
        self._meter.resume(Cost(**state["cost"]))
        return state["step"]

    def keep(self, step: int, logits: torch.Tensor, optimizer: torch.optim.Optimizer, trace: list[dict]) -> None:
        """Write the state every few steps, atomically."""
        if step % _STATE_EVERY == 0:
            moments = {name: value.tolist() for name, value in optimizer.state[logits].items()}
            state = {"step": step, "logits": logits.tolist(), "optimizer": moments, "trace": trace}
            keep(self._folder / "search_state.json", {**state, "cost": self.cost.to_dict()})

    def progress(self, done: float, total: float, **figures: float) -> None:
        """Pass the progress on."""
        self._report(done, total, **figures)

    def warn(self, text: str) -> None:
        """Pass it on."""
        self._say(text)

    def _text_to_weigh(self) -> HeldOut:
        if self._text is None:
            raise UserError("this strategy weighs text too: give the objective validation text, `text`")
        return self._text

    def _write_losses(self, plans: Sequence[Plan], known: Sequence[dict[int, float]], places: set[int]) -> None:
        while places:
            place = places.pop()
            keep_losses(self._evaluations, plans[place], known[place])

    def _hard_gates(self, plans: Sequence[Plan]) -> torch.Tensor:
        """Plans as gates `[plans, groups, options]` of zeros and ones, in the order of the model's branches."""
        options = self._morphable.options
        chosen = torch.tensor([[options.index(option) for option in plan.assignments.values()] for plan in plans])
        return torch.nn.functional.one_hot(chosen, len(options)).float().to(self._morphable.device)

    def _run_plans(self, plans: Sequence[Plan], rows: Sequence[Example]) -> Iterator[tuple[int, torch.Tensor]]:
        """(place, loss of each row) of every plan, in the order in which they are run."""
        ids, marks = self._tensors(rows)
        with self._autocast(), torch.no_grad():
            for place, hidden in self._morphable.each_plan(ids, self._hard_gates(plans)):
                yield place, _question_losses(hidden, self._head, ids, marks)

    def _count_plans(self, plans: Sequence[Plan], keys: Sequence[str], questions: Sequence[int]) -> None:
        """Count the runs that this search asks for and has not asked for before, what they share once."""
        new: dict[tuple[int, ...], int] = {}
        for question in questions:
            places = tuple(place for place, key in enumerate(keys) if (key, question) not in self._asked)
            if places:
                new[places] = new.get(places, 0) + 1
        self._asked.update((key, question) for key in keys for question in questions)
        for places, rows in new.items():
            gates = self._hard_gates([plans[place] for place in places])
            layers = [layer.rows for layer in self._morphable.layers]
            runs = sum(len(layers) - start for _, start in run_order(gates, layers)) / len(layers)
            self._meter.count(torch.empty(rows, self._data.settings.longest, device="meta"), forward=runs)

    def _count_gradient(self, part: Sequence[Example], loss: str) -> None:
        """Count a micro-batch of a gradient, whichever process runs it; the published distance asks the teacher too."""
        ids = torch.empty(len(part), len(part[0].input_ids), device="meta")
        if loss == "hidden":
            self._meter.count(ids)
        self._meter.count(ids, forward=1, backward=1, every_branch=True)

    def _answer_loss(self, gates: torch.Tensor, batch: Sequence[Example]) -> torch.Tensor:
        """What `_question_losses` gives, as a mean with gradient."""
        ids, marks = self._tensors(batch)
        ids, marks, hidden = ids[:, 1:], marks[:, 1:], self._morphable(ids, gates)[:, :-1]
        weights = (marks / marks.sum(1, keepdim=True) / len(batch))[marks]
        return label_loss(hidden[marks], self._head, ids[marks], weights)

    def _hidden_loss(self, gates: torch.Tensor, batch: Sequence[Example]) -> torch.Tensor:
        """`mean over layers and answer tokens |H_mix - H_full|^2`, the norm's square as a mean over the width.

        H is the output of the token mixer where an answer token is predicted; H_full is the teacher's own trajectory,
        run first, in the same model, once a batch.
        """
        ids, marks = self._tensors(batch)
        places = marks.roll(-1, 1)
        outputs: list[torch.Tensor] = []

        def keep(layer: MorphableLayer, hidden: torch.Tensor, arguments: dict[str, Any], output: torch.Tensor) -> None:
            outputs.append(output[places])

        with torch.no_grad():
            self._morphable(ids, observer=keep)
        teacher, outputs[:] = list(outputs), []
        self._morphable(ids, gates, observer=keep)
        pairs = zip(outputs, teacher, strict=True)
        return torch.stack([(mixed.float() - full.float()).square().mean() for mixed, full in pairs]).mean()

    def _mean_text_loss(self, run: Callable[[torch.Tensor], torch.Tensor], head: Head) -> float:
        """Mean next-token loss on the text of what `run(ids)` gives as last hidden states."""
        text, found = self._text_to_weigh(), 0.0
        for together in distributed.rounds(text.in_batches(self._data.settings.tokens_at_once)):
            numbers, counts = together[distributed.rank()]
            with self._autocast():
                losses = text.batch(numbers, self._morphable.device).losses(run, head)
            found += losses.double().sum().item() * counts
        return distributed.total(torch.tensor(found, dtype=torch.float64)).item() / int(text.offsets[-1])

    def _tensors(self, batch: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and answer marks, `[rows, length]`."""
        device = self._morphable.device
        ids = torch.tensor([example.input_ids for example in batch], device=device)
        return ids, torch.tensor([example.is_answer for example in batch], device=device)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._morphable.device.type, torch.bfloat16, enabled=self._bf16)


def _answer_tokens(batch: Sequence[Example]) -> int:
    return sum(sum(example.is_answer) for example in batch)


def _check_finite(losses: Any, kind: str, plan: Plan) -> None:
    if not np.isfinite(losses).all():
        raise UserError(
            f"the {kind} loss of the plan {plan.strip()} is not finite: look at the teacher's and the branches' weights"
        )


def _question_losses(hidden: torch.Tensor, head: Head, ids: torch.Tensor, marks: torch.Tensor) -> torch.Tensor:
    """Mean answer cross-entropy of each row, `[rows]`, from last hidden states `[rows, time, width]`."""
    marks = marks[:, 1:]
    losses = token_losses(hidden[:, :-1][marks], head, ids[:, 1:][marks])
    row = marks.nonzero()[:, 0]
    return torch.zeros(len(ids), device=losses.device).index_add_(0, row, losses.float()) / marks.sum(1)
