"""The objective of a search on a morphable model: the only part of selection that sees a model.

It makes the batches, runs the model, counts what was spent, and keeps every evaluated plan and the state of the search
on disk, so that an interrupted search goes on where it stopped.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from flashmorph.errors import UserError
from flashmorph.files import read_json, write_json
from flashmorph.losses import token_losses
from flashmorph.morphable import Morphable
from flashmorph.plan import Plan
from flashmorph.progress import Report, silent
from flashmorph.selection.strategy import Cost
from flashmorph.tasks import Example, Layout, Style, TaskSettings, make_example

_STATE_EVERY = 10


class SearchSettings(BaseModel):
    """The data of a search. `length` is the context in tokens; a range draws a length for each step."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    length: int | tuple[int, int] = Field(default=(1024, 16384), description="context, or [shortest, longest]")
    batch_tokens: int = Field(default=16_384, gt=0, description="tokens in a step")
    micro_batch_tokens: int = Field(default=16_384, gt=0, description="tokens at once on one device")
    questions: int = Field(default=64, gt=0, description="questions of the search-validation split, over all tasks")

    @property
    def longest(self) -> int:
        """The longest context."""
        return self.length if isinstance(self.length, int) else self.length[1]


class MorphableObjective:
    """Answers, as `Objective` asks, with the model's losses on retrieval questions.

    The answers' loss is everywhere the mean cross-entropy of the answer tokens, teacher-forced.
    """

    def __init__(
        self,
        morphable: Morphable,
        layouts: dict[str, Layout],
        style: Style,
        tasks: Sequence[TaskSettings],
        settings: SearchSettings,
        folder: Path,
        seed: int = 0,
        bf16: bool = False,
        report: Report = silent,
        text_rows: torch.Tensor | None = None,
    ):
        """`layouts` has one for the split `train` and one for `validation`; `folder` keeps the search's state.

        `text_rows` `[rows, length]` are token ids of validation text, for the strategies that weigh text too.

        Raises:
            UserError: `text_rows` has no token to predict.
        """
        if text_rows is not None and (text_rows.ndim != 2 or not len(text_rows) or text_rows.shape[1] < 2):
            raise UserError(
                f"text_rows must be [rows, length] with at least one row of two tokens; got {list(text_rows.shape)}"
            )
        self._morphable, self._layouts, self._style, self._tasks = morphable, layouts, style, list(tasks)
        self._settings, self._folder, self._seed, self._bf16, self._report = settings, folder, seed, bf16, report
        self._space_options = morphable.options
        self._text_rows = text_rows
        self.num_questions = settings.questions
        self.cost = Cost()
        self._started = time.perf_counter()
        self._questions: list[Example] | None = None
        config = morphable.model.config
        branches = sum(weight.numel() for weights in morphable.branch_parameters() for weight in weights)
        every = sum(weight.numel() for weight in morphable.model.model.layers.parameters())
        self._weights_run = {"all branches": every, "one branch": every - branches}
        self._attention_width = config.num_hidden_layers * config.num_attention_heads * config.head_dim

    def gradient(self, gates: torch.Tensor, step: int, loss: str) -> tuple[float, torch.Tensor]:
        """Loss and gradient on the search-train batch number `step`; see `Objective`."""
        losses = {"answers": self._answer_loss, "hidden": self._hidden_loss}
        gates = gates.to(self._morphable.device).requires_grad_(True)
        batch = self._batch(step)
        value = 0.0
        for part in self._micro_batches(batch):
            with self._autocast():
                share = losses[loss](gates, part) * (len(part) / len(batch))
            share.backward()
            value += share.item()
        assert gates.grad is not None
        return value, gates.grad.cpu()

    @torch.no_grad()
    def evaluate(self, plan: Plan, questions: Sequence[int] | None = None) -> np.ndarray:
        """Mean answer cross-entropy of each question; plans evaluated before are read from disk."""
        wanted = list(range(self.num_questions) if questions is None else questions)
        path = self._kept(plan, "json")
        known = {int(number): loss for number, loss in read_json(path)["losses"].items()} if path.exists() else {}
        missing = [number for number in wanted if number not in known]
        if missing:
            gates, rows = self._hard_gates(plan), self._validation()
            for part in self._micro_batches([(number, rows[number]) for number in missing]):
                with self._autocast():
                    losses = self._question_losses(gates, [example for _, example in part])
                known.update({number: loss for (number, _), loss in zip(part, losses.tolist(), strict=True)})
            write_json(path, {"assignments": plan.assignments, "losses": {str(n): known[n] for n in sorted(known)}})
        return np.array([known[number] for number in wanted])

    @torch.no_grad()
    def text_loss(self, plan: Plan) -> float:
        """Mean next-token cross-entropy on `text_rows`, in nats; plans evaluated before are read from disk.

        Raises:
            UserError: there are no `text_rows`.
        """
        if self._text_rows is None:
            raise UserError("this strategy weighs text too: give the objective validation text, `text_rows`")
        path = self._kept(plan, "text.json")
        if path.exists():
            return read_json(path)["text_loss"]
        gates, head = self._hard_gates(plan), self._morphable.model.lm_head
        total = 0.0
        rows = max(1, self._settings.micro_batch_tokens // self._text_rows.shape[1])
        for part in self._text_rows.split(rows):
            ids = part.to(self._morphable.device)
            with self._autocast():
                hidden = self._morphable(ids, gates)[:, :-1]
                total += token_losses(hidden.flatten(0, 1), head, ids[:, 1:].flatten()).double().sum().item()
            self._count(ids, forward=1, backward=0, run="one branch")
        loss = total / self._text_rows[:, 1:].numel()
        write_json(path, {"assignments": plan.assignments, "text_loss": loss})
        return loss

    def restore(self, logits: torch.Tensor, optimizer: torch.optim.Optimizer, trace: list[dict]) -> int:
        """Read the state of an interrupted search, if there is one."""
        path = self._folder / "search_state.json"
        if not path.exists():
            return 0
        state = read_json(path)
        with torch.no_grad():
            logits.copy_(torch.tensor(state["logits"]))
        optimizer.state[logits] = {name: torch.tensor(value) for name, value in state["adam"].items()}
        trace[:] = state["trace"]
        self.cost = Cost(**state["cost"])
        self._started = time.perf_counter() - self.cost.seconds
        return state["step"]

    def keep(self, step: int, logits: torch.Tensor, optimizer: torch.optim.Optimizer, trace: list[dict]) -> None:
        """Write the state every few steps, atomically."""
        self.cost.seconds = time.perf_counter() - self._started
        if step % _STATE_EVERY == 0:
            adam = {name: value.tolist() for name, value in optimizer.state[logits].items()}
            state = {"step": step, "logits": logits.tolist(), "adam": adam, "trace": trace}
            write_json(self._folder / "search_state.json", {**state, "cost": self.cost.to_dict()})

    def progress(self, done: int, total: int, **figures: float) -> None:
        """Pass the progress on."""
        self.cost.seconds = time.perf_counter() - self._started
        self._report(done, total, **figures)

    def _kept(self, plan: Plan, suffix: str) -> Path:
        """Where the losses of `plan` are kept."""
        key = hashlib.sha256(json.dumps(plan.assignments).encode()).hexdigest()[:16]
        return self._folder / "evaluations" / f"{key}.{suffix}"

    def _hard_gates(self, plan: Plan) -> torch.Tensor:
        """The plan as gates `[groups, options]` of zeros and ones, in the order of the model's branches."""
        chosen = torch.tensor([self._space_options.index(option) for option in plan.assignments.values()])
        gates = torch.nn.functional.one_hot(chosen, len(self._space_options)).float()
        return gates.to(self._morphable.device)

    def _answer_loss(self, gates: torch.Tensor, batch: Sequence[Example]) -> torch.Tensor:
        ids, marks = self._tensors(batch)
        hidden = self._morphable(ids, gates)[:, :-1][marks[:, 1:]]
        logits = self._morphable.model.lm_head(hidden).float()
        self._count(ids, forward=1, backward=1)
        return torch.nn.functional.cross_entropy(logits, ids[:, 1:][marks[:, 1:]])

    def _hidden_loss(self, gates: torch.Tensor, batch: Sequence[Example]) -> torch.Tensor:
        """`mean over layers and answer tokens |H_mix - H_full|^2`, the norm's square as a mean over the width.

        H is the output of the token mixer where an answer token is predicted; H_full is the teacher's own trajectory.
        """
        ids, marks = self._tensors(batch)
        places = marks.roll(-1, 1)
        outputs: list[torch.Tensor] = []
        with self._morphable.observed(lambda layer, hidden, arguments, output: outputs.append(output[places])):
            with torch.no_grad():
                self._morphable(ids)
            teacher, outputs[:] = list(outputs), []
            self._morphable(ids, gates)
        self._count(ids, forward=1, backward=0, run="one branch")
        self._count(ids, forward=1, backward=1)
        pairs = zip(outputs, teacher, strict=True)
        return torch.stack([(mixed.float() - full.float()).square().mean() for mixed, full in pairs]).mean()

    def _question_losses(self, gates: torch.Tensor, batch: Sequence[Example]) -> torch.Tensor:
        """Mean cross-entropy of each row's answer tokens, `[rows]`."""
        ids, marks = self._tensors(batch)
        marks = marks[:, 1:]
        hidden = self._morphable(ids, gates)[:, :-1][marks]
        losses = torch.zeros(marks.shape, device=ids.device)
        losses[marks] = token_losses(hidden, self._morphable.model.lm_head, ids[:, 1:][marks])
        self._count(ids, forward=1, backward=0, run="one branch")
        return losses.sum(1) / marks.sum(1)

    def _batch(self, step: int) -> list[Example]:
        """The rows of one search-train step, of one length, tasks in turn."""
        length = self._settings.length
        if not isinstance(length, int):
            length = int(np.random.default_rng([self._seed, step]).integers(length[0], length[1] + 1))
        rows = max(1, self._settings.batch_tokens // length)
        return [self._example("train", length, step * rows + row) for row in range(rows)]

    def _validation(self) -> list[Example]:
        if self._questions is None:
            length = self._settings.longest
            self._questions = [self._example("validation", length, number) for number in range(self.num_questions)]
        return self._questions

    def _example(self, split: str, length: int, number: int) -> Example:
        task = self._tasks[number % len(self._tasks)]
        return make_example(task, self._layouts[split], self._style, split, length, self._seed, number)

    def _micro_batches(self, batch: list) -> list[list]:
        rows = max(1, self._settings.micro_batch_tokens // self._settings.longest)
        return [batch[start : start + rows] for start in range(0, len(batch), rows)]

    def _tensors(self, batch: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and answer marks, `[rows, length]`."""
        device = self._morphable.device
        ids = torch.tensor([example.input_ids for example in batch], device=device)
        return ids, torch.tensor([example.is_answer for example in batch], device=device)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._morphable.device.type, torch.bfloat16, enabled=self._bf16)

    def _count(self, ids: torch.Tensor, forward: int, backward: int, run: str = "all branches") -> None:
        """Tokens, and FLOPs: two for each weight and token, forward and backward (activations only) alike.

        Attention adds its causal half of `4 * time * width` a token and layer.
        """
        self.cost.tokens_forward += forward * ids.numel()
        self.cost.tokens_backward += backward * ids.numel()
        per_token = 2 * self._weights_run[run] + 2 * ids.shape[1] * self._attention_width
        self.cost.flops += (forward + backward) * ids.numel() * per_token
