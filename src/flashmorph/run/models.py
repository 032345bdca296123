"""Open a run's checkpoints: plain, sharded, with branches, or as a search objective."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from flashmorph.convert.load import load_config, load_model
from flashmorph.data.rows import Rows
from flashmorph.model.frozen import frozen_dtype, narrow
from flashmorph.model.morphable import Morphable
from flashmorph.model.sharding import Model, in_turn, is_sharded
from flashmorph.plan import Budget
from flashmorph.progress import Report, silent
from flashmorph.run.data import held_out_text, search_data, training_rows
from flashmorph.run.folder import Stage
from flashmorph.run.run import Run
from flashmorph.selection import STRATEGIES, Selection
from flashmorph.selection.distilling import Distiller
from flashmorph.selection.objective import MorphableObjective
from flashmorph.selection.search import select
from flashmorph.selection.searchdata import SearchSettings
from flashmorph.selection.state import StateOnDisk
from flashmorph.stages import DistillSettings


def open_stage(run: Run, stage: Stage) -> PreTrainedModel:
    """The model that a stage saved, in float32: it holds the master weights of training, which casts by itself."""
    return load_model(stage.folder / "model", torch.float32, run.loads_on)


def open_frozen(run: Run, stage: Stage, device: torch.device | None = None) -> PreTrainedModel:
    """The model that a stage saved, for forwards under autocast, its weights in their `frozen_dtype`."""
    folder = stage.folder / "model"
    model = load_model(folder, frozen_dtype(load_config(folder), run.bf16), device or run.loads_on)
    return narrow(model, run.bf16)


def open_answering(run: Run, stage: Stage, dtype: str) -> PreTrainedModel:
    """The model that a stage saved, to generate with: it ends where the teacher's own settings say now.

    The stage's copy of generation_config.json may be older than the teacher's.
    """
    model = load_model(stage.folder / "model", dtype, run.device)
    if ends := run.teacher.generation().get("eos_token_id"):
        model.generation_config.eos_token_id = ends
    return model


def open_sharded(run: Run, make: Callable[[], Model], shard: Callable[[Model, torch.device, bool], Model]) -> Model:
    """The model that `make` returns, sharded over the ranks if the recipe sets `shard`."""
    if not run.shards:
        return make()
    model = in_turn(lambda: shard(make(), run.device, run.bf16), run.device)
    if not is_sharded(model):
        raise ValueError(f"{type(model).__name__} has no sharded weights")
    return model


def open_morphable(run: Run, host: Stage, branches: Stage) -> Morphable:
    """The host with its aligned branches, frozen: for forwards under autocast."""
    morphable = Morphable(open_frozen(run, host))
    morphable.load_branch_state(load_file(branches.folder / "branches.safetensors"))
    return morphable


def run_search(
    run: Run,
    morphable: Morphable,
    budget: Budget | str,
    folder: Path,
    report: Report,
    evaluations: Path | None = None,
) -> Selection:
    """Search by the recipe's strategy and settings.

    Args:
        run: Its recipe has strategy, settings, seed and questions.
        morphable: The host with its aligned branches.
        budget: How much may stay full.
        folder: Where the state of the search is kept.
        report: Called with the progress.
        evaluations: Where losses of plans are kept, for other searches too; by default inside `folder`.

    Raises:
        UserError: see `select`.
    """
    chosen, say = run.recipe.select, run.screen.say
    record = STRATEGIES[chosen.strategy]
    objective = open_objective(
        run,
        morphable,
        folder,
        evaluations=evaluations,
        needs_text=record.needs_text,
        needs_training=record.needs_training,
    )
    state = StateOnDisk(folder, say)
    seed, settings = run.recipe.seed, chosen.settings
    return select(morphable, budget, chosen.strategy, objective, seed, report, say, state, **settings)


def open_objective(
    run: Run,
    morphable: Morphable,
    folder: Path,
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
        folder: The search's own.
        search: Sizes of its data; None: the recipe's.
        judging: The split whose questions it sees.
        evaluations: Where losses of evaluated plans are kept; None: in `folder`.
        needs_text: Whether it also has the loss on held-out text.
        needs_training: Whether it can also distill plans.
    """
    recipe, search = run.recipe, search or run.recipe.select.search
    text, distiller = None, None
    if needs_text:
        text = held_out_text(run, judging, search.longest, max(search.text_tokens, search.longest))
        if text.tokens < text.wanted:
            run.screen.say(f"select: the text loss is on all {text.tokens:,} tokens of the split {judging!r}")
    if needs_training:

        def make_rows(settings: DistillSettings) -> Rows:
            return training_rows(run, settings, "distill", silent)

        distiller = Distiller(morphable, make_rows, recipe.distill, folder / "distilled", recipe.seed, run.bf16)
    data = search_data(run, judging, search)
    return MorphableObjective(morphable, data, folder, run.bf16, text, distiller, evaluations, run.screen.say)
