"""What a search has asked for: counted once, whether it was run, or read from disk where an earlier search left it."""

from collections.abc import Sequence

import torch

from flashmorph.data.heldout import HeldOut
from flashmorph.hosts import FEED_FORWARD
from flashmorph.model.morphable import Morphable
from flashmorph.model.order import rows_by_layer, run_order
from flashmorph.plan import FULL, Plan
from flashmorph.selection.cache import key_of
from flashmorph.selection.meter import Meter, Parts
from flashmorph.selection.strategy import Cost
from flashmorph.stages import DistillSettings
from flashmorph.tasks import Example


class Ledger:
    """Counts the runs that a search asks for and has not asked for before.

    So a search costs the same whatever other searches have left on disk.
    """

    def __init__(self, morphable: Morphable):
        self._meter = Meter(morphable)
        self._layers = len(morphable.layers)
        self._options = morphable.options
        self._questions: set[tuple[str, int]] = set()
        self._texts: set[str] = set()
        self._distilled: set[tuple[str, int]] = set()

    @property
    def cost(self) -> Cost:
        """What was spent so far, seconds included."""
        return self._meter.look()

    def resume(self, cost: Cost) -> None:
        """Go on counting from what an interrupted search had spent."""
        self._meter.resume(cost)

    def gradient(self, rows: Sequence[Example], loss: str) -> None:
        """Count a micro-batch of a gradient, whichever process runs it; the published distance asks the teacher too."""
        size = len(rows), len(rows[0].input_ids)
        if loss == "hidden":
            self._meter.count(*size, self._teacher)
        self._meter.count(*size, self._meter.every_branch, inputs=1)

    def plans(self, keys: Sequence[str], gates: torch.Tensor, questions: Sequence[int], length: int) -> None:
        """Count plans on questions of `length` tokens, what the plans share from the first layer up once.

        `keys` are those that their losses are kept under (`key_of`), `gates` the plans `[plans, groups, options]`.
        """
        new: dict[tuple[int, ...], int] = {}
        for question in questions:
            unasked = tuple(index for index, key in enumerate(keys) if (key, question) not in self._questions)
            if unasked:
                new[unasked] = new.get(unasked, 0) + 1
        self._questions.update((key, question) for key in keys for question in questions)
        for unasked, rows in new.items():
            self._meter.count(rows, length, self._parts_together(gates[list(unasked)]))

    def effects(self, kind: str, effects: Sequence[float], receivers: Sequence[int], length: int) -> None:
        """Count a counterfactual pair: both texts, and for senders what lies between each and the last receiver.

        For receivers nothing else is run but the feed-forward at a few positions, which is not counted.
        """
        self._meter.count(2, length, self._teacher)
        if kind == "receiver":
            return
        heads = len(effects) // self._layers
        hit = sorted({row // heads for row in receivers})
        for layer in range(self._layers):
            above = [each for each in hit if each > layer]
            if above:
                self._meter.count(heads, length, {FULL: len(above), FEED_FORWARD: above[-1] - layer})

    def texts(self, keys: Sequence[str], gates: torch.Tensor, text: HeldOut) -> None:
        """Count plans on the text, as in `plans`."""
        new = {key: index for index, key in enumerate(keys) if key not in self._texts}
        self._texts.update(new)
        if new:
            parts = self._parts_together(gates[list(new.values())])
            for piece in text.pieces:
                self._meter.count(1, len(piece), parts)

    def distilled(self, path: Sequence[Plan], settings: DistillSettings, steps: int) -> None:
        """Count `steps` steps for every plan of a path; a beginning that was counted before is not counted again."""
        about = [plan.assignments for plan in path]
        for length in range(1, len(path) + 1):
            counted = (key_of(about[:length]), steps)
            if counted not in self._distilled:
                self._distilled.add(counted)
                size = settings.steps * settings.batch_rows, settings.length
                self._meter.count(*size, self._teacher)
                self._meter.count(*size, self._parts_of(path[length - 1]), inputs=1, weights=1)

    @property
    def _teacher(self) -> Parts:
        return self._meter.parts_of([[FULL]] * self._layers)

    def _parts_together(self, gates: torch.Tensor) -> Parts:
        """What is run for the plans `[plans, groups, options]`: layers that they share from the first one up once."""
        chosen = gates.argmax(-1).tolist()
        order, layers = run_order(gates, self._layers), rows_by_layer(gates.shape[1], self._layers)
        return self._meter.parts_of(
            [self._options[chosen[index][row]] for row in layer] for index, start in order for layer in layers[start:]
        )

    def _parts_of(self, plan: Plan) -> Parts:
        options = list(plan.assignments.values())
        return self._meter.parts_of(
            [options[row] for row in rows] for rows in rows_by_layer(len(options), self._layers)
        )
