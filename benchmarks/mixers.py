r"""What is each mixer of our own type good for? Recall, perplexity, cache and time of a teacher with it.

    python benchmarks/mixers.py --teacher tiny --recipe demo --layers 2,5
    python benchmarks/mixers.py --teacher tiny --recipe demo --layers 2,5 --set align.tokens=131072 --mixers linear \
        gated_delta_net mamba2 "linear, dynamic convolution" "gated_delta_net, dynamic convolution" \
        "mamba2, dynamic convolution"
    python benchmarks/mixers.py --teacher teachers/llama --recipe demo --layers 2,5
    python benchmarks/mixers.py --teacher MODEL.gguf --recipe laptop --data runs/text --layers 7,8,15,17,18,21,23 \
        --wide --set evaluate.questions=16 evaluate.length=768 evaluate.perplexity_tokens=8192

Each mixer switches all layers but `--layers`, and then all of them. Nothing is trained, but for recurrences, whose
alignment is the recipe's. `dash` has the gamma that a density asks for, on the rows that alignment starts from. Reading
and writing are the teacher's seconds over the mixer's, in turns, at `evaluate.length` tokens. Finished rows are kept in
`benchmarks/results/mixers.json` and not computed again.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from flashmorph.bench import BenchSettings, bench
from flashmorph.cli.options import Options, open_run, quiet
from flashmorph.errors import UserError
from flashmorph.evaluation import Score, evaluate, paired_share_interval, perplexity_ratio
from flashmorph.files import write_json
from flashmorph.hosts import cache_bytes
from flashmorph.model.morphable import Morphable, attach
from flashmorph.pipeline.branches import run_align, run_transplant
from flashmorph.plan import Budget
from flashmorph.recipe.questions import held_out, open_questions
from flashmorph.run.data import calibration, training_rows
from flashmorph.run.models import open_morphable, open_stage
from flashmorph.run.run import Run

NARROW = {
    "window": {"mixers": "full,window", "window": 32},
    "thin": {"mixers": "full,thin", "window": 32, "points": 16},
    "thin, express": {"mixers": "full,thin", "window": 32, "points": 16, "schedule": "express"},
    "pooled": {"mixers": "full,pooled", "window": 32, "segment": 16},
    "dash, a quarter": {"mixers": "full,dash", "chunk": 16, "density": 0.25},
    "dash, a half": {"mixers": "full,dash", "chunk": 16, "density": 0.5},
    "dash, four fifths": {"mixers": "full,dash", "chunk": 16, "density": 0.8},
}
STATES = {
    f"{mixer}{about}": {"mixers": f"full,{mixer}", **taps}
    for about, taps in (("", {}), (", dynamic convolution", {"conv": 4}))
    for mixer in ("linear", "gated_delta_net", "mamba2")
}
"""They have parameters that nothing but training gives."""
WIDE = {
    **NARROW,
    "window": {"mixers": "full,window", "window": 128},
    "thin": {"mixers": "full,thin", "window": 64, "points": 16},
    "thin, express": {"mixers": "full,thin", "window": 64, "points": 16, "schedule": "express"},
    "pooled": {"mixers": "full,pooled", "window": 64, "segment": 16},
}
"""For teachers of longer contexts: about as many bytes of cache each at 768 tokens, but for `dash`."""


def main() -> None:
    """Measure what is missing, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="tiny")
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--data", help="text")
    parser.add_argument("--layers", default="2,5", help="full layers of the one plan; the other has none")
    parser.add_argument("--wide", action="store_true", help="sizes for longer contexts")
    parser.add_argument("--mixers", nargs="+", help="only these")
    parser.add_argument("--set", nargs="+", default=[], help="changes of the recipe")
    parser.add_argument("--show", action="store_true", help="measure nothing")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/mixers.json"))
    arguments = parser.parse_args()
    quiet()
    rows = json.loads(arguments.output.read_text())["rows"] if arguments.output.exists() else []
    untrained = WIDE if arguments.wide else NARROW
    specs = untrained | STATES
    try:
        for name in [] if arguments.show else arguments.mixers or untrained:
            about = {"teacher": Path(arguments.teacher).name, "mixer": name, "set": " ".join(arguments.set)}
            if not any(about.items() <= row.items() for row in rows):
                rows += [{**about, **row} for row in measured(arguments, name, specs[name])]
                write_json(arguments.output, {"rows": rows})
    except UserError as error:
        parser.exit(2, f"{error}\n")
    show(rows)


def measured(arguments: argparse.Namespace, name: str, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of one mixer."""
    form = name.replace(", ", "-").replace(" ", "-")
    options = Options(
        teacher=arguments.teacher,
        output=Path(f"runs/mixers-{Path(arguments.teacher).stem}-{form}"),
        recipe=arguments.recipe,
        changes=[*(f"host.{key}={value}" for key, value in settings.items()), *arguments.set],
        data=arguments.data,
    )
    run: Run = open_run(options, ["align", "evaluate"])
    morphable = opened(run, name in STATES)
    layers = [int(each) for each in arguments.layers.split(",")]
    questions = open_questions(run.recipe, run.corpus, run.tokenizer)
    text = held_out(run.recipe, run.corpus, run.tokenizer)
    length = run.recipe.evaluate.length

    def judged(full: list[int], what: str) -> tuple[Any, Score]:
        heads = morphable.space(Budget("heads", 1))
        groups = [group for group in heads.groups if group.layer in full]
        model = morphable.instantiate(heads.plan(groups, heads.count(len(groups))))
        model.config.dtype = torch.float32
        return model, evaluate(model, run.tokenizer, questions, text, run.recipe.evaluate)

    everything = list(range(len(morphable.layers)))
    teacher, best = judged(everything, "teacher")
    for what, full in (("outside the best layers", layers), ("everywhere", [])):
        model, score = judged(full, what)
        timed = bench(
            {"teacher": teacher, "mixer": model}, BenchSettings(lengths=(length,), repeats=3, decode_tokens=4)
        )
        ratios = timed["models"]["mixer"]
        ends = paired_share_interval(*([each.right[task] for task in questions] for each in (score, best)))
        yield {
            "where": what,
            "settings": settings,
            "recall": score.recall,
            "recall_of_teacher": best.recall,
            "recall_minus_teacher": list(ends),
            "perplexity": score.perplexity,
            "perplexity_of_teacher": best.perplexity,
            "perplexity_ratio": perplexity_ratio(score, best)["interval"],
            "cache_bytes": {"context": length, "mixer": cache_bytes(model.config, length)},
            "cache_bytes_of_teacher": cache_bytes(teacher.config, length),
            "bench": {kind: {"of_first": ratios[kind]["of_first"]} for kind in ("prefill", "decode")},
        }


def opened(run: Run, trained: bool) -> Morphable:
    """The host with its branches, which are aligned or only started."""
    host = run_transplant(run)
    if trained:
        return open_morphable(run, host, run_align(run, host))
    rows = training_rows(run, run.recipe.align, "align", lambda *done, **figures: None)
    return attach(open_stage(run, host), calibration(run, rows)["input_ids"])[0]


def show(rows: list[dict[str, Any]]) -> None:
    """A line for every row."""
    table = Table(title="mixers of our own type; times are the teacher's over the mixer's", title_justify="left")
    words = ("teacher", "mixer", "where")
    for column in (*words, "recall", "teacher", "perplexity", "cache", "reading", "writing"):
        table.add_column(column, justify="left" if column in words else "right")
    for row in rows:
        share = row["cache_bytes"]["mixer"] / row["cache_bytes_of_teacher"]
        times = (f"{1 / row['bench'][kind]['of_first'][0]['median']:.2f}" for kind in ("prefill", "decode"))
        perplexity = f"{100 * (row['perplexity'] / row['perplexity_of_teacher'] - 1):+.1f} %"
        recalls = (f"{100 * row[key]:.1f} %" for key in ("recall", "recall_of_teacher"))
        table.add_row(*(row[word] for word in words), *recalls, perplexity, f"{100 * share:.0f} %", *times)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
