"""Does a hybrid bear quantisation as its teacher does? Recall and perplexity of both in llama.cpp, type by type.

    python benchmarks/quantised.py runs/demo --llama-cpp .llama.cpp/llama_cpp_python-0.3.36/vendor/llama.cpp

Both models go through `flashmorph export`, in float32 and as `q8_0`; `q4_0` and `Q4_K_M` are made of the float32 file
by the function of llama.cpp that `llama-quantize` calls. Each answers the recipe's test questions greedily and scores
its held-out text, token by token (`llama_answers.cpp`), in a cache of float16. The hybrid is compared with the teacher
by the same type, and each with itself in float32. `make test-serving` builds that llama.cpp; any other one will do that
has its shared libraries in `build/bin`. Writes `benchmarks/results/quantised.json`.
"""

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from rich.console import Console
from rich.table import Table

from flashmorph.cli.options import OUT, quiet
from flashmorph.cli.screen import RichScreen
from flashmorph.convert.digests import weights_digest
from flashmorph.convert.load import load_config, load_tokenizer
from flashmorph.convert.teacher import locate
from flashmorph.data.heldout import HeldOut
from flashmorph.evaluation import Score, perplexity_ratio, recall_difference
from flashmorph.evaluation.perplexity import RangeLosses
from flashmorph.files import write_json
from flashmorph.pipeline.export import export_gguf
from flashmorph.recipe.questions import held_out, open_questions
from flashmorph.recipe.recipe import load_recipe, with_settings
from flashmorph.tasks import Example
from flashmorph.tokens.continuation import continuation
from flashmorph.tokens.special_tokens import end_tokens

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from llama_tools import compiled, stand_in

TYPES = {"f32": None, "q8_0": None, "q4_0": 2, "q4_k_m": 15}
"""None: the converter's own; else the number in llama.h (`llama_ftype`)."""


class Asked:
    """Questions by task and text, as rows for `llama_answers`, and what its answers are worth."""

    def __init__(self, tokenizer, ends: Sequence[int], questions: dict[str, Sequence[Example]], text: HeldOut):
        self.tokenizer, self.ends, self.questions, self.text = tokenizer, set(ends), questions, text

    def rows(self) -> np.ndarray:
        """The number of new tokens, of tokens, and these, `[numbers]`: all questions, then all pieces of text."""
        prompts = [example.prompt for examples in self.questions.values() for example in examples]
        rows = [[prompt.answer_tokens, len(prompt.input_ids), *prompt.input_ids] for prompt in prompts]
        rows += [[0, len(piece), *piece] for piece in self.text.pieces]
        return np.concatenate([np.array(row, np.int32) for row in rows])

    def score(self, found: np.ndarray) -> Score:
        """Right answers and losses out of the results `[numbers]`."""
        place, right = 0, {}
        for task, examples in self.questions.items():
            right[task] = []
            for example in examples:
                made = found[place : place + example.prompt.answer_tokens].astype(int).tolist()
                place += len(made)
                right[task].append(self._is_right(example, made))
        losses = []
        for piece, first in zip(self.text.pieces, self.text.firsts, strict=True):
            losses.append(found[place + first - 1 : place + len(piece) - 1])
            place += len(piece) - 1
        assert place == len(found)
        by_range = RangeLosses.of(np.concatenate(losses).astype(float), self.text)
        return Score(right, by_range.perplexity["perplexity"], {}, by_range)

    def _is_right(self, example: Example, made: list[int]) -> bool:
        end = next((position for position, token in enumerate(made) if token in self.ends), None)
        text = continuation(self.tokenizer, example.prompt.input_ids, made[:end])
        return example.prompt.score(text, ended=end is not None) == 1


def gguf(folder: Path, converter: Path, program: Path, kind: str, place: Path) -> Path:
    """The checkpoint in `folder` as a GGUF file of this type."""
    file = place / f"{kind}.gguf"
    if file.exists():
        return file
    if TYPES[kind] is None:
        export_gguf(folder, file, converter, kind)
    else:
        whole = gguf(folder, converter, program, "f32", place)
        run([program, "quantise", whole, file, TYPES[kind]])
    return file


def run(command: list) -> None:
    """A program whose messages are shown only where it fails."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, errors="replace")
    if done.returncode:
        sys.exit(f"{command[0]} failed ({done.returncode}): {done.stderr[-2000:]}")


def row_of(name: str, kind: str, file: Path, score: Score, whole: Score | None, teacher: Score | None) -> dict:
    """A model's figures, and its differences from itself in float32 and from its teacher by the same type."""
    figures = {"model": name, "type": kind, "file_bytes": file.stat().st_size, **score.to_dict()}
    for key, other in (("minus_float32", whole), ("minus_teacher", teacher)):
        if other:
            recall, perplexity = recall_difference(score, other), perplexity_ratio(score, other)
            figures[key] = {"recall": recall, "perplexity": perplexity}
    return {key: value for key, value in figures.items() if key != "cache_bytes"}


def show(rows: list[dict]) -> None:
    """A line a model and type."""
    table = Table(title="llama.cpp", title_justify="left")
    for column in ("model", "type", "MiB", "recall", "95 %", "perplexity", "over float32", "hybrid over teacher"):
        table.add_column(column, justify="right")
    for row in rows:
        low, high = row["recall_interval"]
        over = [row[key]["perplexity"]["ratio"] if key in row else 1 for key in ("minus_float32", "minus_teacher")]
        cells = [f"{100 * row['recall']:.1f} %", f"{100 * low:.1f}-{100 * high:.1f}", f"{row['perplexity']:.3f}"]
        cells += [f"{over[0]:.4f}", f"{over[1]:.4f}" if "minus_teacher" in row else ""]
        table.add_row(row["model"], row["type"], f"{row['file_bytes'] / 2**20:.2f}", *cells)
    OUT.print(table)


def main() -> None:
    """Convert, ask, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hybrid", type=Path, help="a run or a folder with a hybrid")
    parser.add_argument("--llama-cpp", type=Path, required=True)
    parser.add_argument("--teacher", default="tiny")
    parser.add_argument("--recipe", default="demo", help="its questions and its text")
    parser.add_argument("--questions", type=int, help="a task; default: the recipe's")
    parser.add_argument("--types", nargs="+", choices=list(TYPES), default=list(TYPES))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/quantised.json"))
    arguments = parser.parse_args()
    quiet()
    recipe = load_recipe(arguments.recipe)
    if arguments.questions:
        recipe = with_settings(recipe, {"evaluate.questions": arguments.questions})
    folders = {"teacher": locate(arguments.teacher)[0], "hybrid": arguments.hybrid}
    tokenizer, corpus = load_tokenizer(folders["teacher"]), recipe.data.corpus
    assert tokenizer
    ends = end_tokens(tokenizer, load_config(folders["teacher"]))
    asked = Asked(tokenizer, ends, open_questions(recipe, corpus, tokenizer), held_out(recipe, corpus, tokenizer))
    rows, scores = [], {}
    with TemporaryDirectory() as temporary, RichScreen(Console(stderr=True)).stage("evaluate", "llama.cpp") as report:
        place = Path(temporary)
        asked.rows().tofile(place / "rows")
        program = compiled(arguments.llama_cpp, Path(__file__).with_name("llama_answers.cpp"), place)
        converter = stand_in(arguments.llama_cpp, place / "llama.cpp")
        for kind in arguments.types:
            for name, folder in folders.items():
                (place / name).mkdir(exist_ok=True)
                file = gguf(folder, converter, program, kind, place / name)
                run([program, file, place / "rows", arguments.threads, place / "results"])
                score = asked.score(np.fromfile(place / "results", np.float32))
                whole, teacher = scores.get((name, "f32")), scores.get(("teacher", kind))
                rows.append(row_of(name, kind, file, score, whole, teacher))
                scores[name, kind] = score
                report(len(rows), len(arguments.types) * len(folders))
    about = {"command": f"python benchmarks/quantised.py {shlex.join(sys.argv[1:])}"}
    settings = {"questions": recipe.evaluate.questions, "length": recipe.evaluate.length}
    write_json(arguments.output, {**about, "weights": weights_digest(arguments.hybrid), **settings, "rows": rows})
    show(rows)


if __name__ == "__main__":
    main()
