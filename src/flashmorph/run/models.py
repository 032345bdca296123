"""Open a run's checkpoints: plain, sharded, with branches, or as a search objective."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from flashmorph.convert.load import load_model
from flashmorph.data.rows import Rows
from flashmorph.model.morphable import Morphable
from flashmorph.model.sharding import Model, in_turn, is_sharded
from flashmorph.progress import Report, silent
from flashmorph.run.data import held_out_text, search_data, training_rows
from flashmorph.run.folder import Stage
from flashmorph.run.run import Run
from flashmorph.selection.distilling import Distiller
from flashmorph.selection.objective import MorphableObjective
from flashmorph.selection.searchdata import SearchSettings
from flashmorph.stages import DistillSettings

SEARCH_TEXT_TOKENS = 16_384


def open_stage(run: Run, stage: Stage) -> PreTrainedModel:
    """The model that a stage saved, in float32: it holds the master weights of training, which casts by itself."""
    return load_model(stage.folder / "model", torch.float32, run.loads_on)


def divided(run: Run, make: Callable[[], Model], shard: Callable[[Model, torch.device, bool], Model]) -> Model:
    """The model that `make` returns, sharded over the ranks if the recipe sets `shard`."""
    if not run.shards:
        return make()
    model = in_turn(lambda: shard(make(), run.device, run.bf16))
    if not is_sharded(model):
        raise ValueError(f"{type(model).__name__} has no sharded weights")
    return model


def open_morphable(run: Run, host: Stage, branches: Stage) -> Morphable:
    """The host with its aligned branches."""
    morphable = Morphable(open_stage(run, host))
    morphable.load_branch_state(load_file(branches.folder / "branches.safetensors"))
    return morphable


def open_objective(
    run: Run,
    morphable: Morphable,
    folder: Path,
    report: Report,
    search: SearchSettings | None = None,
    judging: str = "validation",
    evaluations: Path | None = None,
    needs_text: bool = False,
    needs_training: bool = False,
) -> MorphableObjective:
    """The objective of a search: losses of plans, their gradients, and short distillations.

    Args:
        run: Teacher, recipe and device.
        morphable: The host with its aligned branches.
        folder: Where the search keeps its state.
        report: Called with the progress of the search.
        search: Sizes of its data; None: the recipe's.
        judging: The split whose questions it sees.
        evaluations: Where losses of evaluated plans are kept; None: in `folder`.
        needs_text: Whether it also has the loss on held-out text.
        needs_training: Whether it can also distill plans.
    """
    recipe, search = run.recipe, search or run.recipe.select.search
    text, distiller = None, None
    if needs_text:
        text = held_out_text(run, judging, search.longest, max(SEARCH_TEXT_TOKENS, search.longest))
        if text.tokens < text.wanted:
            run.screen.say(f"select: the text loss is on all {text.tokens:,} tokens of the split {judging!r}")
    if needs_training:

        def make_rows(settings: DistillSettings) -> Rows:
            return training_rows(run, settings, "distill", silent)

        distiller = Distiller(morphable, make_rows, recipe.distill, folder / "distilled", recipe.seed, run.bf16)
    data = search_data(run, judging, search)
    return MorphableObjective(morphable, data, folder, run.bf16, report, text, distiller, evaluations, run.screen.say)
