"""Folders of runs that an editor, a disk or a power cut has damaged: reported, gone on with, or read again."""

import atexit
import json
import logging
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from conftest import FEW_STEPS, run_command
from safetensors.torch import save_file

from flashmorph.data.corpus import Corpus
from flashmorph.data.heldout import HeldOut
from flashmorph.data.rows import pack
from flashmorph.estimate.auto import chosen
from flashmorph.plan import FULL, Budget, Plan
from flashmorph.report import write_report
from flashmorph.report.charts import Chart
from flashmorph.report.interactive import spec
from flashmorph.report.source import read_run
from flashmorph.report.write import _sections
from flashmorph.run.folder import RunFolder
from flashmorph.selection.cache import SearchState, keep_losses, kept, kept_losses, tensors_of
from flashmorph.stages.checkpoints import drop_damaged, finish, last_checkpoint
from flashmorph.stages.training import logged
from hostile.damage import damage
from hostile.harness import OUTPUT, Case
from hostile.seeds import in_turn
from hostile.teachers import copy_of

RECIPE = {**FEW_STEPS, "baseline": None, "tasks": {"one_key": FEW_STEPS["tasks"]["one_key"]}}
REPORTED = (
    "results.json", "plan.json", "recipe.yaml", "flashmorph.json", "evaluate.json", "bench.json",
    "compare/compare.json", "stages/select-*/trace.json", "stages/align-*/stage.json",
)  # fmt: skip
STAGED = (
    "stages/*/stage.json", "stages/*/model/config.json", "stages/*/model/model.safetensors", "stages/*/plan.json",
    "stages/*/branches.safetensors", "stages/*/right.json", "stages/*/text.json", "stages/*/log.jsonl",
    "flashmorph.json",
)  # fmt: skip


@cache
def teacher() -> Path:
    """The teacher of the run."""
    return copy_of("qwen3", _place() / "teacher")


@cache
def finished() -> Path:
    """A finished run with all that a report can show, made once."""
    recipe, run = _place() / "recipe.yaml", _place() / "run"
    recipe.write_text(yaml.safe_dump(RECIPE))
    assert run_command("morph", teacher(), "--recipe", recipe, "--output", run) == 0
    figures = _figures()
    for name, values in figures.items():
        path = run / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(values))
    return run


@cache
def _place() -> Path:
    place = Path(tempfile.mkdtemp(prefix="hostile"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    return place


def _figures() -> dict[str, Any]:
    """What `evaluate`, `bench` and `compare` leave in a run."""
    rate = {"recall": 0.5, "interval": [0.25, 0.75], "questions": 4}
    rows = [{"task": "a", "length": 64, **rate, "depths": [{"depth": depth, **rate} for depth in (0.0, 1.0)]}]
    worst = [{"task": "a", "length": 64, "depth": 0.0, "recall": 0.5}]
    grid = {"recall": 0.5, "rows": rows, "worst": worst, "left_out": ["b at 64"]}
    kinds = [{"group": group, "class": name, "tokens": 9, "first": 1.0, "difference": 0.1, "interval": [0.0, 0.2]}
             for group, name in (("all", "all"), ("kind", "digits"))]  # fmt: skip
    sample = {"tokens": ["x", "y"], "kinds": ["digits"] * 2, "first": [1.0, 2.0], "difference": [0.5, -0.5]}
    minus = {"grid": {"difference": 0.1, "interval": [0.0, 0.2]}, "tokens": {"classes": kinds, "sample": sample}}
    models = {"teacher": {"grid": grid}, "hybrid": {"grid": grid, "minus_first": minus}}
    times = [{"median": 0.001, "quartiles": [0.0009, 0.0012]}] * 2
    timed = {kind: {"by_length": times} for kind in ("prefill", "decode")}
    machine = {"device": "cpu", "dtype": "float32", "threads": 1}
    bench = {"machine": machine, "settings": {"lengths": [64, 128]}, "models": {"teacher": timed, "hybrid": timed}}
    row = {
        "strategy": "nll",
        "budget": "1",
        "seeds": 1,
        "flops": 10.0,
        "regret": 0.1,
        "regret_spread": None,
        "rank": 1.0,
    }
    compare = {"rows": [row, {**row, "strategy": "first", "flops": 0.0}], "truths": {"1": {"plans": 2, "best": [1]}}}
    return {"evaluate.json": {"models": models}, "bench.json": bench, "compare/compare.json": compare}


def _copy(folder: Path, name: str = "run") -> Path:
    return Path(shutil.copytree(finished(), folder / name))


def _one(rng: random.Random, run: Path, patterns: tuple[str, ...]) -> Path:
    return rng.choice(sorted(run.glob(rng.choice(patterns))))


def _page(rng: random.Random, run: Path) -> Callable[[], object]:
    """All of a report but what is drawn into files; of its figures one."""

    def look() -> None:
        blocks = [block for section in _sections(read_run(run)) for block in section.blocks]
        chart = rng.choice([block for block in blocks if isinstance(block, Chart)])
        assert all(map(spec, chart.panels))

    return look


def _report(rng: random.Random) -> Case:
    """A report of a run one of whose files is damaged."""

    def prepare(folder: Path) -> Callable[[], object]:
        run = _copy(folder)
        damage(rng, _one(rng, run, REPORTED))
        return _page(rng, run)

    return Case("report", "", prepare)


def _drawn(rng: random.Random) -> Case:
    """The same, drawn and written."""

    def prepare(folder: Path) -> Callable[[], object]:
        run = _copy(folder)
        damage(rng, _one(rng, run, REPORTED))
        return lambda: write_report(run, folder / OUTPUT / "report.html")

    return Case("report drawn", "", prepare)


def _stage(rng: random.Random) -> Case:
    """Finished stages that a run would use again."""

    def prepare(folder: Path) -> Callable[[], object]:
        run = _copy(folder, OUTPUT)
        records = [json.loads(path.read_text()) for path in sorted(run.glob("stages/*/stage.json"))]
        damage(rng, _one(rng, run, STAGED))

        def find() -> None:
            held = RunFolder(run)
            try:
                for record in records:
                    found = held.find(record["stage"], record["settings"], record["inputs"])
                    assert found
                    held.remember("last", found)
                    assert held.last("last") == found.folder.name
            finally:
                held.release()

        return find

    return Case("stage", "", prepare)


def _select(rng: random.Random) -> Case:
    """A search on a run one of whose files is damaged."""

    def prepare(folder: Path) -> list[str]:
        run = _copy(folder, OUTPUT)
        damage(rng, _one(rng, run, (*STAGED, "recipe.yaml")))
        options = ["--from", str(run), "--output", str(run / "found.json"), "--strategy", "uniform", "--budget", "1"]
        return ["select", str(teacher()), *options]

    return Case("select", "", prepare)


def _quietly(work: Callable[[], object]) -> Callable[[], object]:
    """Work that says in the log what it makes again: there it is no error."""

    def run() -> None:
        logging.disable(logging.WARNING)
        try:
            work()
        finally:
            logging.disable(logging.NOTSET)

    return run


def _checkpoint(rng: random.Random) -> Case:
    """Two checkpoints of training, the newest damaged: it is whole, or the one before it is taken."""

    def prepare(folder: Path) -> Callable[[], object]:
        stage = folder / OUTPUT
        for step in (1, 2):
            place = stage / "checkpoints" / f"checkpoint-{step}"
            place.mkdir(parents=True)
            save_file({"weight": torch.full((8,), float(step))}, place / "trainable.safetensors")
            for name in ("optimizer.pt", "scheduler.pt"):
                torch.save({"step": step}, place / name)
            (place / "trainer_state.json").write_text(json.dumps({"global_step": step}))
            finish(place)
        newest = stage / "checkpoints" / "checkpoint-2"
        if rng.random() < 0.2:
            (newest / "finished").write_text("{}")
        damage(rng, rng.choice(sorted(newest.iterdir())))

        def look() -> None:
            drop_damaged(stage)
            found = Path(last_checkpoint(stage) or "")
            assert found.name in ("checkpoint-1", "checkpoint-2")
            assert (found / "trainable.safetensors").is_file() and torch.load(found / "optimizer.pt")

        return _quietly(look)

    return Case("checkpoint", "", prepare)


def _log(rng: random.Random) -> Case:
    """The log of a stage that has just finished its training."""

    def prepare(folder: Path) -> Callable[[], object]:
        log = folder / "log.jsonl"
        log.write_text("".join(json.dumps({"step": step, "loss": 1.0 / step}) + "\n" for step in range(1, 9)))
        damage(rng, log)
        return lambda: [entry["loss"] + entry["step"] for entry in logged(folder)]

    return Case("log", "", prepare)


def _rows(rng: random.Random) -> Case:
    """Rows on disk: they are as they were, or made again."""

    def prepare(folder: Path) -> Callable[[], object]:
        from conftest import tiny_tokenizer

        (folder / "text.txt").write_text("\n".join(f"line {number} of a text" for number in range(900)))
        path, corpus, tokenizer = folder / OUTPUT / "rows.npy", Corpus(str(folder / "text.txt")), tiny_tokenizer()
        pack(corpus, tokenizer, "train", 32, 4, 0, path, None)
        whole = path.read_bytes()
        half = path.read_bytes()[: rng.randrange(len(whole))]
        path.write_bytes(half if rng.random() < 0.5 else rng.choice((b"", b"PK\x05\x06" + bytes(18), b"\x93NUMPY\x01")))

        def look() -> None:
            pack(corpus, tokenizer, "train", 32, 4, 0, path, None)
            assert path.read_bytes() == whole

        return _quietly(look)

    return Case("rows", "", prepare)


def _held_out(rng: random.Random) -> Case:
    """Held-out text on disk."""

    def prepare(folder: Path) -> Callable[[], object]:
        text = HeldOut([[1, 2, 3], [4, 5]], [0, 1], [1, 0], 8, 100)
        text.save(path := folder / "test.npz")
        damage(rng, path)

        def look() -> None:
            assert HeldOut.load(path).documents == [0, 1]

        return look

    return Case("held-out text", "", prepare)


def _search(rng: random.Random) -> Case:
    """What a search keeps: it is read as it was, or made again."""

    def prepare(folder: Path) -> Callable[[], object]:
        plan = Plan({"layers.0": FULL, "layers.1": "linear"}, Budget("layers", 1))
        moments = {"step": 1.0, "exp_avg": [0.0, 0.1], "exp_avg_sq": 0.5}
        cost = dict.fromkeys(("tokens_forward", "tokens_backward", "flops", "seconds"), 1)
        state = {"step": 1, "logits": [0.5, 1.0], "optimizer": moments, "trace": [{"step": 0}], "cost": cost}
        keep_losses(folder, plan, {0: 0.5, 1: 0.25})
        (losses,) = folder.iterdir()
        (folder / "search_state.json").write_text(json.dumps(state))
        (folder / "auto.json").write_text(json.dumps({"align.micro_batch_tokens": 64}))
        damage(rng, rng.choice((losses, folder / "search_state.json", folder / "auto.json")))

        def look() -> None:
            said: list[str] = []
            (found,) = kept_losses(folder, [plan], said.append)
            assert all(np.isfinite(loss) for loss in found.values())
            state = kept(folder / "search_state.json", said.append, SearchState)
            tensors = tensors_of(state, torch.Size([2])) if state else None
            assert tensors is None or tensors["logits"].shape == tensors["exp_avg"].shape
            assert all(isinstance(value, int) for value in chosen(folder).values())

        return _quietly(look)

    return Case("search", "", prepare)


_MAKERS = (
    _report, _stage, _report, _checkpoint, _report, _search, _log, _report, _stage, _held_out, _checkpoint, _report,
    _search, _stage, _report, _log, _checkpoint, _report, _stage, _rows, _report, _select, _report, _drawn,
)  # fmt: skip


def generate(seed: int, number: int) -> Iterator[Case]:
    """`number` cases."""
    return in_turn("runs", _MAKERS, seed, number)
