"""Is a quarter of the layers, chosen by the answers' NLL, as good as a half at regular intervals? With sliding windows.

    python benchmarks/windows.py --teacher teachers/deep

The claim is that of NLL-guided selection (arXiv 2606.27791), whose layers look through a window, and at the first
`--sinks` tokens, while they read the prompt only: the answer's tokens attend fully. Both forms are judged in one
teacher-forced pass, by masks: that one (`published`), and a checkpoint whose switched layers always look through the
window (`stock`, what `--window` builds). No weight changes. Scores are measured on the search's questions, plans on
the referee's; the mask is the only difference between rows. Writes `benchmarks/results/windows.json`.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import Qwen3ForCausalLM

from flashmorph.cli.options import quiet
from flashmorph.convert.teacher import open_teacher
from flashmorph.data.corpus import Corpus
from flashmorph.evaluation import paired_interval
from flashmorph.evaluation.intervals import share_interval
from flashmorph.files import write_json
from flashmorph.losses import token_losses
from flashmorph.recipe.questions import open_layout
from flashmorph.recipe.recipe import load_recipe
from flashmorph.selection.searchdata import SearchData
from flashmorph.tasks import STYLES, Example

HERE = Path(__file__).parent
FORMS = ("published", "stock")
ROWS = 32


class Judge:
    """Answer losses of one teacher under plans of full and windowed layers, on one split's questions."""

    def __init__(self, model: Qwen3ForCausalLM, questions: list[Example], window: int, sinks: int):
        self._model, self._questions, self._window, self._sinks = model, questions, window, sinks

    @torch.no_grad()
    def losses(self, full: set[int], form: str) -> tuple[np.ndarray, np.ndarray]:
        """Mean answer NLL and whether every answer token comes first, each `[questions]`."""
        types = ["full_attention" if layer in full else "sliding_attention" for layer in range(self.layers)]
        self._model.config.layer_types = types
        losses, right = [], []
        for start in range(0, len(self._questions), ROWS):
            rows = self._questions[start : start + ROWS]
            ids = torch.tensor([row.input_ids for row in rows])
            marks = torch.tensor([row.is_answer for row in rows])
            hidden = self._model.model(input_ids=ids, attention_mask=self._masks(marks, form), use_cache=False)[0]
            for states, tokens, mark in zip(hidden[:, :-1], ids[:, 1:], marks[:, 1:], strict=True):
                losses.append(token_losses(states[mark], self._model.lm_head, tokens[mark]).mean().item())
                right.append(bool((self._model.lm_head(states[mark]).argmax(-1) == tokens[mark]).all()))
        return np.array(losses), np.array(right)

    @property
    def layers(self) -> int:
        """How many there are."""
        return self._model.config.num_hidden_layers

    def _masks(self, marks: torch.Tensor, form: str) -> dict[str, torch.Tensor]:
        """By layer type, true where a position may look: `[1 or batch, 1, time, time]`."""
        time = marks.shape[1]
        distance = torch.arange(time)[:, None] - torch.arange(time)
        causal = (distance >= 0)[None, None]
        windowed = causal & (distance < self._window)
        if form == "published":
            # What predicts an answer token stands one place before it.
            answering = marks.roll(-1, 1)[:, None, :, None]
            windowed = causal & (windowed | (torch.arange(time) < self._sinks) | answering)
        return {"full_attention": causal, "sliding_attention": windowed}


def main() -> None:
    """Score layers, cut plans, judge them, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="teachers/deep", help="a Qwen3, by folder")
    parser.add_argument("--window", type=int, default=32, help="tokens, the token itself included")
    parser.add_argument("--sinks", type=int, default=10, help="first tokens that the published form always sees")
    parser.add_argument("--questions", type=int, default=64, help="to score layers with; the paper takes 64")
    parser.add_argument("--judged", type=int, default=512, help="to judge plans with")
    arguments = parser.parse_args()
    quiet()
    rows = [row for form in FORMS for row in compare(form, arguments)]
    command = "python benchmarks/windows.py " + " ".join(f"--{name} {value}" for name, value in vars(arguments).items())
    write_json(HERE / "results" / "windows.json", {"command": command, "rows": rows})
    Console().print(table_of(rows))


def compare(form: str, arguments: argparse.Namespace) -> list[dict]:
    """The rows of one form: all full, all windowed, and plans of a quarter and a half."""
    search, referee = (judge(arguments, split) for split in ("validation", "referee"))
    layers = search.layers
    quarter, half = layers // 4, layers // 2
    base, _ = search.losses(set(), form)
    gains = [
        base.mean() - search.losses({layer}, form)[0].mean() for layer in track(range(layers), f"{form}: layers scored")
    ]
    order = list(np.argsort(gains)[::-1])
    plans = {
        "all full": [set(range(layers))],
        "half, periodic": periodic(layers, half),
        "quarter, by NLL": [set(map(int, order[:quarter]))],
        "quarter, periodic": periodic(layers, quarter),
        "none full": [set()],
    }
    judged = {name: [referee.losses(full, form) for full in some] for name, some in plans.items()}
    chosen = judged["quarter, by NLL"][0][0]
    rows = []
    for name, found in judged.items():
        # Periodic plans of every offset: the best of them, by what it is judged by, stands for all.
        best = int(np.argmin([losses.mean() for losses, _ in found]))
        losses, right = found[best]
        rows.append(
            {
                "form": form,
                "plan": name,
                "full": sorted(plans[name][best]),
                "nll": float(losses.mean()),
                "nll_of_every_offset": [float(some.mean()) for some, _ in found],
                "exact": float(right.mean()),
                "exact_interval": share_interval(right.tolist()),
                "exact_of_every_offset": [float(some.mean()) for _, some in found],
                "nll_minus_chosen": float(losses.mean() - chosen.mean()),
                "interval": paired_interval([losses], [chosen]),
            }
        )
    return rows


def judge(arguments: argparse.Namespace, split: str) -> Judge:
    """The teacher with the questions of one split."""
    teacher, recipe = open_teacher(arguments.teacher), load_recipe(HERE / "referee" / "keys.yaml")
    tokenizer = teacher.tokenizer()
    assert tokenizer
    number = arguments.judged if split == "referee" else arguments.questions
    settings = recipe.select.search.model_copy(update={"questions": number})
    layouts = {name: open_layout(recipe, Corpus(), tokenizer, name) for name in ("train", split)}
    data = SearchData(layouts, STYLES[recipe.style], list(recipe.tasks.values()), settings)
    model = teacher.load(torch.float32, torch.device("cpu"))
    assert isinstance(model, Qwen3ForCausalLM)
    return Judge(model, data.questions(), arguments.window, arguments.sinks)


def periodic(layers: int, kept: int) -> list[set[int]]:
    """The layouts of `kept` full layers at regular intervals, one an offset."""
    step = layers // kept
    return [set(range(offset, layers, step)) for offset in range(step)]


def table_of(rows: list[dict]) -> Table:
    """The rows on a screen."""
    table = Table(title="answers' NLL and exact answers, teacher-forced; periodic plans at their best offset")
    for column in ("form", "plan", "full layers", "NLL", "exact", "NLL - quarter by NLL", "95 %"):
        table.add_column(column, justify="left" if column in ("form", "plan") else "right")
    for row in rows:
        low, high = row["interval"]
        figures = (f"{row['nll']:.3f}", f"{row['exact']:.1%}", f"{row['nll_minus_chosen']:+.3f}")
        full = ",".join(map(str, row["full"])) if len(row["full"]) < 8 else f"{len(row['full'])} layers"
        table.add_row(row["form"], row["plan"], full, *figures, f"{low:+.3f} to {high:+.3f}")
    return table


if __name__ == "__main__":
    main()
