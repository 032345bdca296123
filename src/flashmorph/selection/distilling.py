"""Short distillations inside a search, for the strategies that train weights."""

import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from flashmorph import distributed
from flashmorph.data.rows import Rows
from flashmorph.errors import UserError
from flashmorph.files import atomic_path, digest_of, write_json
from flashmorph.inputs.shapes import Finite, read_as
from flashmorph.model.frozen import frozen_dtype, narrow
from flashmorph.model.morphable import Morphable
from flashmorph.plan import FULL, Budget, Plan
from flashmorph.stages import DistillSettings, distill, logged
from flashmorph.stages.trainer import trainable_state

_KL = "kl.json"
_LOG = logging.getLogger(__name__)


def _finished(kept: Path) -> float | None:
    """The KL of a distillation whose weights are in `kept`; None where there is none that is whole."""
    if not kept.exists():
        return None
    try:
        with safe_open(kept, "pt"):
            return read_as(kept.with_name(_KL), Finite)
    except (OSError, SafetensorError, UserError) as error:
        _LOG.warning("%s is damaged (%s); making it again", kept.parent, str(error).partition("\n")[0])
        return None


class Distiller:
    """Trains plans one after the other, each from the weights of the one before.

    A layer that a plan switches starts from its aligned branch. The weights of the last path, and of the path without
    its last plan, are kept in `folder`, so that the next plan goes on from them.
    """

    def __init__(
        self,
        morphable: Morphable,
        make_rows: Callable[[DistillSettings], Rows],
        settings: DistillSettings,
        folder: Path,
        seed: int = 0,
        bf16: bool = False,
    ):
        """`settings` are those of the `distill` stage; its tokens give way to the number of steps asked for."""
        self._morphable, self._make_rows, self._settings = morphable, make_rows, settings
        self._folder, self._seed, self._bf16 = folder, seed, bf16
        self._teacher: PreTrainedModel | None = None

    def settings_for(self, steps: int) -> DistillSettings:
        """The settings of a distillation of `steps` steps."""
        return self._settings.model_copy(update={"tokens": steps * self._settings.batch_tokens})

    def run(self, path: Sequence[Plan], steps: int) -> tuple[PreTrainedModel, float]:
        """The last plan's model after the whole path, and its KL: the mean of the last quarter of its steps."""
        weights = self._folder_of(path, steps)
        kept = weights / "model.safetensors"
        if (known := distributed.first(lambda: _finished(kept))) is not None:
            model = self._morphable.instantiate(path[-1])
            model.load_state_dict(load_file(kept), strict=False)
            return model.eval(), known
        model = self._start(path, steps)
        settings = self.settings_for(steps)
        distill(model, self._full_model(), self._make_rows(settings), settings, weights, self._seed, self._bf16)

        def keep() -> float:
            losses = [entry["loss"] for entry in logged(weights)]
            kl = float(np.mean(losses[-max(1, steps // 4) :]))
            write_json(weights / _KL, kl)
            shutil.rmtree(weights / "checkpoints", ignore_errors=True)
            with atomic_path(kept) as temporary:
                save_file(trainable_state(model), temporary)
            names = {weights.name, self._folder_of(path[:-1], steps).name}
            for other in self._folder.iterdir():
                if other.name not in names:
                    shutil.rmtree(other)
            return kl

        return model, distributed.first(keep)

    def _start(self, path: Sequence[Plan], steps: int) -> PreTrainedModel:
        """The last plan with the weights that the path before it left, where a layer still has the same mixer."""
        model = self._morphable.instantiate(path[-1])
        if len(path) > 1:
            before, _ = self.run(path[:-1], steps)
            known = before.state_dict()
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    if name in known:
                        weight.copy_(known[name])
        return model

    def _full_model(self) -> PreTrainedModel:
        """The teacher, as a plain model."""
        if self._teacher is None:
            space = self._morphable.space(Budget("layers", 1))
            every = Plan(dict.fromkeys(space.groups, FULL), Budget("layers", len(space.groups)))
            dtype = frozen_dtype(self._morphable.model.config, self._bf16)
            teacher = self._morphable.instantiate(every, dtype, shared=True).requires_grad_(False)
            self._teacher = narrow(teacher, self._bf16)
        return self._teacher

    def _folder_of(self, path: Sequence[Plan], steps: int) -> Path:
        return self._folder / digest_of([steps, [plan.assignments for plan in path]])
