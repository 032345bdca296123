"""The first stages of the path: the exact move into the host, and branches that learn the attention."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from flashmorph import distributed
from flashmorph.convert.gguf import origin_of
from flashmorph.convert.load import load_config
from flashmorph.convert.save import write_host
from flashmorph.files import atomic_path
from flashmorph.hosts import (
    host_for,
    host_of,
    host_settings,
    with_branches_to_train,
)
from flashmorph.model.frozen import narrow
from flashmorph.model.morphable import Morphable, attach
from flashmorph.model.sharding import shard_morphable, whole
from flashmorph.pipeline.training import trained_on
from flashmorph.progress import Report
from flashmorph.records import Figures
from flashmorph.run.data import calibration, training_rows
from flashmorph.run.digests import (
    training_settings,
)
from flashmorph.run.folder import Stage
from flashmorph.run.models import open_sharded, open_stage
from flashmorph.run.run import Run
from flashmorph.stages import (
    align,
    alignment_errors,
)


def run_transplant(run: Run) -> Stage:
    """Teacher to host, proven in float32, saved in the teacher's dtype."""
    settings = host_settings(host_for(run.teacher.config, run.recipe.host), run.recipe.host)

    def work(folder: Path, report: Report) -> Figures:
        figures = write_host(
            run.teacher, folder / "model", settings, run.device, report, run.allow_unused, over_folder=True
        )
        origin = origin_of(run.teacher.folder)
        return {**figures, **({"teacher_weights": origin} if origin else {})}

    wanted = {"format": 1, **({"host": settings} if settings else {})}
    stage = run.stage("transplant", run.teacher.name, wanted, [run.teacher.digest], work, alone=True)
    for notice in stage.record.get("notices", []):
        run.screen.say(notice)
    return stage


def run_align(run: Run, host: Stage) -> Stage:
    """A linear branch beside every attention, trained to give the attention's output; windows need no training."""
    settings = run.recipe.align
    if not with_branches_to_train(host_of(load_config(host.folder / "model"))):
        return run.stage("align", "nothing: a window has no weights", {}, [host.digest], _no_branches, alone=True)

    def work(folder: Path, report: Report) -> Figures:
        settings = run.at_once("align", folder).align
        rows = training_rows(run, settings, "align", report)
        first = calibration(run, rows)
        start: list[float] = []

        def open_attached() -> Morphable:
            # Branches start from products in float32.
            morphable, start[:] = attach(open_stage(run, host), first["input_ids"])
            narrow(morphable.model, run.bf16, [weight for each in morphable.branch_parameters() for weight in each])
            return morphable

        morphable = open_sharded(run, open_attached, shard_morphable)
        align(morphable, rows, settings, folder, run.recipe.seed, run.bf16, report, run.recipe.report_to)
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.bf16):
            errors = alignment_errors(morphable, **first)
        state = whole(morphable.branch_state())
        if distributed.is_first():
            with atomic_path(folder / "branches.safetensors") as temporary:
                save_file(state, temporary)
                shutil.copymode(folder / "log.jsonl", temporary)  # safetensors lets nobody else read.
        worse = worse_than_silent(errors, len(morphable.layers))
        summary = f"relative error by layer {_listed(start)} at the start, {_listed(errors)} now"
        figures = {"errors_at_start": start, "errors": errors, "worse_than_silent": worse}
        return {**figures, **trained_on(run, settings, rows), "summary": summary}

    wanted = {**training_settings(run, settings), "calibration_rows": run.recipe.calibration_rows}
    stage = run.stage("align", f"{settings.tokens:,} tokens", wanted, [host.digest], work)
    if worse := stage.record.get("worse_than_silent"):
        run.screen.say(warning(worse))
    return stage


def worse_than_silent(errors: Sequence[float], layers: int) -> list[int]:
    """Layers one of whose branches has a relative error of 1 or more; `errors` has those of each layer in turn."""
    return sorted({index * layers // len(errors) for index, error in enumerate(errors) if not error < 1})


def warning(worse: list[int]) -> str:
    """What to say of layers that alignment leaves worse than silent."""
    numbers = ", ".join(map(str, worse))
    layers, them = (f"layers {numbers} are", "them") if len(worse) > 1 else (f"layer {numbers} is", "it")
    return (
        f"after alignment {layers} worse than a silent branch (relative error 1 or more): train longer, or with "
        f"another learning rate, before you trust a plan that switches {them}"
    )


def _no_branches(folder: Path, report: Report) -> Figures:
    save_file({}, folder / "branches.safetensors")
    return {"tokens": 0, "summary": "the attention itself looks through it"}


def _listed(values: list[float]) -> str:
    return " ".join(f"{value:.2f}".removeprefix("0") for value in values)
