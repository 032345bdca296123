"""The stages of the path that train whole hybrids: distillation and extension to long contexts."""

from pathlib import Path

from flashmorph import distributed
from flashmorph.convert.save import save_model
from flashmorph.convert.shards import is_whole
from flashmorph.data.isolation import how_apart
from flashmorph.data.rows import Rows
from flashmorph.hosts import (
    host_for,
    supports_varlen,
)
from flashmorph.model.sharding import shard_student, shard_teacher
from flashmorph.progress import Report
from flashmorph.records import Figures
from flashmorph.run.data import training_rows
from flashmorph.run.digests import (
    logit_settings,
    training_settings,
)
from flashmorph.run.folder import Stage
from flashmorph.run.models import open_frozen, open_sharded, open_stage
from flashmorph.run.run import Run
from flashmorph.stages import (
    RowsWithLogits,
    TrainSettings,
    distill,
    extend,
    logged,
    logits_on_disk,
    write_logits,
)


def trained_on(run: Run, settings: TrainSettings, rows: Rows) -> Figures:
    """What a stage that trains says of its data."""
    host = host_for(run.teacher.config, run.recipe.host)
    varlen = supports_varlen(host, run.device)
    documents = "long" if settings.takes_long_documents else how_apart(settings.keeps_apart, varlen)
    return {
        "tokens": settings.tokens_run,
        "documents": documents,
        "mean_context": rows.mean_context(settings.keeps_apart),
        "sharded": run.shards,
    }


def run_distill(run: Run, host: Stage, built: Stage, layout: str = "") -> Stage:
    """The hybrid learns the teacher's distribution on text; `layout` as in `finish`."""
    settings = run.recipe.distill
    logits = run_logits(run, host, settings.teacher_logits.top_k) if settings.teacher_logits else None

    def work(folder: Path, report: Report) -> Figures:
        rows = training_rows(run, settings, "distill", report)
        if not _has_model(folder):
            train(folder, rows, report)
        return {**trained_on(run, settings, rows), "summary": _last_loss(folder, "KL")}

    def train(folder: Path, rows: Rows, report: Report) -> None:
        settings = run.at_once("distill", folder).distill
        student = open_sharded(run, lambda: open_stage(run, built), shard_student)
        teacher = None if logits else open_sharded(run, lambda: open_frozen(run, host), shard_teacher)
        given = RowsWithLogits(rows, logits.folder) if logits else rows
        distill(student, teacher, given, settings, folder, run.recipe.seed, run.bf16, report, run.recipe.report_to)
        save_model(student, folder / "model", built.folder / "model")

    about = f"{layout} {settings.tokens:,} tokens of length {settings.length:,}".strip()
    inputs = [built.digest, *([logits.digest] if logits else [])]
    label = f"distill {layout}".strip()
    return run.stage("distill", about, training_settings(run, settings), inputs, work, label=label)


def run_logits(run: Run, host: Stage, top_k: int) -> Stage:
    """The teacher's likeliest tokens on the rows of `distill`, for a teacher that does not fit beside its student."""
    settings = run.recipe.distill

    def work(folder: Path, report: Report) -> Figures:
        settings = run.at_once("logits", folder).distill
        run.screen.say(f"logits: {logits_on_disk(settings, top_k)}, in {folder.parent}")
        rows = training_rows(run, settings, "distill", report)
        teacher = open_frozen(run, host, run.device)
        write_logits(teacher, rows, settings, top_k, folder, run.bf16, report)
        return {**trained_on(run, settings, rows), "summary": logits_on_disk(settings, top_k)}

    about = f"the teacher's {top_k:,} likeliest next tokens"
    return run.stage("logits", about, logit_settings(run, settings, top_k), [host.digest], work)


def run_extend(run: Run, distilled: Stage, layout: str = "") -> Stage:
    """Next-token training at a longer context; `layout` as in `finish`."""
    settings = run.recipe.extend
    assert settings

    def work(folder: Path, report: Report) -> Figures:
        rows = training_rows(run, settings, "extend", report)
        if not _has_model(folder):
            train(folder, rows, report)
        return {**trained_on(run, settings, rows), "summary": _last_loss(folder, "loss")}

    def train(folder: Path, rows: Rows, report: Report) -> None:
        settings = run.at_once("extend", folder).extend
        assert settings
        model = open_sharded(run, lambda: open_stage(run, distilled), shard_student)
        extend(model, rows, settings, folder, run.recipe.seed, run.bf16, report, run.recipe.report_to)
        save_model(model, folder / "model", distilled.folder / "model")

    about = f"{layout} {settings.tokens:,} tokens of length {settings.length:,}".strip()
    label = f"extend {layout}".strip()
    return run.stage("extend", about, training_settings(run, settings), [distilled.digest], work, label=label)


def _has_model(folder: Path) -> bool:
    """Whether an interrupted stage had saved its model already."""
    return distributed.first(lambda: is_whole(folder / "model"))


def _last_loss(folder: Path, name: str) -> str:
    losses = [entry["loss"] for entry in logged(folder)[-10:]]
    return f"{name} {sum(losses) / len(losses):.3f} nats a token" if losses else f"{name} unknown: its log is gone"
