"""Losses of gates and of plans on the batches of a search, run on a morphable model: no disk, no counting.

Several processes run a share of each batch and get the same results.
"""

from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from transformers import PreTrainedModel

from flashmorph import distributed
from flashmorph.data.heldout import Batch, HeldOut
from flashmorph.hosts.parts import decoder_of
from flashmorph.losses import Head, label_loss, token_losses
from flashmorph.mixers.mixer import LayerArguments
from flashmorph.model.layer import MorphableLayer
from flashmorph.model.morphable import Morphable
from flashmorph.plan import Plan
from flashmorph.selection.effects import PairEffects
from flashmorph.selection.searchdata import SearchData
from flashmorph.tasks import Example
from flashmorph.tasks.counterfactual import Pair


class ModelLosses:
    """The losses of a morphable model on the questions of `data` and on the validation text `text`, if there is one.

    The answers' loss is everywhere the mean over questions of each question's mean cross-entropy of its answer tokens,
    teacher-forced; neither it nor its gradient depends on how many rows are run at once.
    """

    def __init__(self, morphable: Morphable, data: SearchData, text: HeldOut | None = None, bf16: bool = False):
        self.morphable, self.data, self.text, self._bf16 = morphable, data, text, bf16
        self._head = Head.of(morphable.model)

    def gradient(self, gates: torch.Tensor, batch: Sequence[Example], loss: str) -> tuple[float, torch.Tensor]:
        """Loss of `gates` `[groups, options]` on a batch, `answers` or `hidden`, and its gradient in them, on the CPU.

        Gates lie outside of whatever wraps the model, so their gradient is brought together here.
        """
        run, size = {"answers": (self._answer_loss, len), "hidden": (self._hidden_loss, _answer_tokens)}[loss]
        gates = gates.to(self.morphable.device).requires_grad_(True)
        value = 0.0
        for together in distributed.rounds(self.data.micro_batches(batch, len(batch[0].input_ids))):
            part, counts = together[distributed.rank()]
            with self._autocast():
                share = run(gates, part) * (counts * size(part) / size(batch))
            share.backward()
            value += share.item()
        assert gates.grad is not None
        gradient = distributed.total(gates.grad.cpu())
        return distributed.total(torch.tensor(value, dtype=torch.float64)).item(), gradient

    def of_plans(self, plans: Sequence[Plan], rows: Sequence[Example]) -> Iterator[tuple[int, torch.Tensor]]:
        """(index of the plan, loss of each row `[rows]`) of every plan, in the order in which they are run.

        What plans have in common from the first layer up is computed once (`Morphable.each_plan`). Runs in this process
        alone.
        """
        ids, marks = self._tensors(rows)
        with self._autocast(), torch.no_grad():
            for index, hidden in self.morphable.each_plan(ids, self.hard_gates(plans)):
                yield index, _question_losses(hidden, self._head, ids, marks)

    @torch.no_grad()
    def effects(self, pair: Pair | None, groups: int, receivers: Collection[int] | None) -> list[float] | None:
        """Receiver effects of each of `groups` on a pair, or given `receivers` sender effects; None where there is
        nothing to measure."""
        if pair is None:
            return None
        with self._autocast():
            measured = PairEffects(self.morphable, self._head, pair, groups)
            if not measured.counts:
                return None
            return measured.receivers() if receivers is None else measured.senders(receivers)

    @torch.no_grad()
    def text_of_plans(self, plans: Sequence[Plan], report: Callable[[float], None] | None = None) -> list[float]:
        """Mean next-token cross-entropy of each plan on the text, in nats.

        As in `of_plans`, what plans have in common is computed once. `report` is called with the share that is done.
        """
        gates = self.hard_gates(plans)

        def run(batch: Batch) -> Iterator[tuple[int, torch.Tensor]]:
            for index, hidden in self.morphable.each_plan(batch.ids, gates):
                yield index, batch.losses(hidden, self._head)

        return self._mean_text_losses(run, len(plans), report)

    @torch.no_grad()
    def of_model(self, model: PreTrainedModel, answers: bool) -> tuple[float, list[float]]:
        """Of a model built from a plan: the loss on the text, and with `answers` that of each question, in nats."""
        head = Head.of(model)

        def run(batch: Batch) -> Iterator[tuple[int, torch.Tensor]]:
            yield 0, batch.losses(decoder_of(model)(batch.ids, use_cache=False).last_hidden_state, head)

        [text] = self._mean_text_losses(run, 1)
        losses: list[float] = []
        for part in self.data.micro_batches(self.data.questions() if answers else []):
            ids, marks = self._tensors(part)
            with self._autocast():
                hidden = decoder_of(model)(ids, use_cache=False).last_hidden_state
                losses += _question_losses(hidden, head, ids, marks).tolist()
        return text, losses

    def hard_gates(self, plans: Sequence[Plan]) -> torch.Tensor:
        """Plans as gates `[plans, groups, options]` of zeros and ones on the CPU, in the order of the branches."""
        options = self.morphable.options
        chosen = torch.tensor([[options.index(option) for option in plan.assignments.values()] for plan in plans])
        return torch.nn.functional.one_hot(chosen, len(options)).float()

    def _answer_loss(self, gates: torch.Tensor, batch: Sequence[Example]) -> torch.Tensor:
        """What `_question_losses` gives, as a mean with gradient."""
        ids, marks = self._tensors(batch)
        ids, marks, hidden = ids[:, 1:], marks[:, 1:], self.morphable(ids, gates)[:, :-1]
        weights = (marks / marks.sum(1, keepdim=True) / len(batch))[marks]
        return label_loss(hidden[marks], self._head, ids[marks], weights)

    def _hidden_loss(self, gates: torch.Tensor, batch: Sequence[Example]) -> torch.Tensor:
        """`mean over layers and answer tokens |H_mix - H_full|^2`, the norm's square as a mean over the width.

        H is the output of the token mixer where an answer token is predicted; H_full is the teacher's own trajectory,
        run first, in the same model, once a batch.
        """
        ids, marks = self._tensors(batch)
        predicting = marks.roll(-1, 1)
        outputs: list[torch.Tensor] = []

        def keep(layer: MorphableLayer, hidden: torch.Tensor, arguments: LayerArguments, output: torch.Tensor) -> None:
            of_answers = output[predicting]
            # A backward that runs layers again must make the same tensors, and would hold all of them here.
            if len(outputs) < len(self.morphable.layers):
                outputs.append(of_answers)

        with torch.no_grad():
            self.morphable(ids, observer=keep)
        teacher, outputs[:] = list(outputs), []
        self.morphable(ids, gates, observer=keep)
        pairs = zip(outputs, teacher, strict=True)
        return torch.stack([(mixed.float() - full.float()).square().mean() for mixed, full in pairs]).mean()

    def _mean_text_losses(
        self,
        run: Callable[[Batch], Iterator[tuple[int, torch.Tensor]]],
        count: int,
        report: Callable[[float], None] | None = None,
    ) -> list[float]:
        """`count` mean losses on the text; `run(batch)` gives the number of each with its tokens' losses."""
        text, sums = self.text, torch.zeros(count, dtype=torch.float64)
        assert text is not None
        rounds = distributed.rounds(text.in_batches(self.data.settings.tokens_at_once))
        for number, together in enumerate(rounds):
            pieces, counts = together[distributed.rank()]
            with self._autocast():
                for done, (index, losses) in enumerate(run(text.batch(pieces, self.morphable.device)), 1):
                    sums[index] += losses.cpu().double().sum().item() * counts
                    if report:
                        report((number + done / count) / len(rounds))
        return (distributed.total(sums) / int(text.offsets[-1])).tolist()

    def _tensors(self, batch: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and answer marks, `[rows, length]`."""
        device = self.morphable.device
        ids = torch.tensor([example.input_ids for example in batch], device=device)
        return ids, torch.tensor([example.is_answer for example in batch], device=device)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.morphable.device.type, torch.bfloat16, enabled=self._bf16)


def _answer_tokens(batch: Sequence[Example]) -> int:
    return sum(sum(example.is_answer) for example in batch)


def _question_losses(hidden: torch.Tensor, head: Head, ids: torch.Tensor, marks: torch.Tensor) -> torch.Tensor:
    """Mean answer cross-entropy of each row, `[rows]`, from last hidden states `[rows, time, width]`."""
    marks = marks[:, 1:]
    losses = token_losses(hidden[:, :-1][marks], head, ids[:, 1:][marks])
    row = marks.nonzero()[:, 0]
    return torch.zeros(len(ids), device=losses.device).index_add_(0, row, losses.float()) / marks.sum(1)
