"""What a search costs on 28 and 48 layers, a quarter of them full: random models of that depth, counted in sequences.

    python benchmarks/search_cost.py

The sequences that a search runs do not depend on a model's width or on the context, so this is also what it costs on a
Qwen3-1.7B (28 layers), in tokens at the context that is searched at; the published searches' tokens stand beside it
(literature: FlashMorph, arXiv 2606.30562; HALO and KL-guided as counted there). A random model's layers are worth next
to nothing, so races find little to decide on: for them this is the dear case. Writes
`benchmarks/results/search_cost.json`.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import Qwen3Config, Qwen3ForCausalLM

import flashmorph
from flashmorph.cli.options import quiet
from flashmorph.corpus import Corpus
from flashmorph.files import write_json
from flashmorph.selection.objective import MorphableObjective
from flashmorph.selection.searchdata import SearchData, SearchSettings
from flashmorph.tasks import STYLES, Haystack, Layout, TaskSettings
from flashmorph.teacher import load_tokenizer, open_teacher

SHAPES = ((28, 7), (48, 12))
"""Layers, and how many stay full."""
LENGTH = 128
CONTEXTS = {"1K": 1024, "8K": 8192}
PUBLISHED = {"gates": 20e6, "halo": 234e6, "kl": 20e9}
"""Tokens of the published searches on 28 layers."""
STRATEGIES = {
    "race": {},
    "greedy-forward": {},
    "budgeted-gates": {"steps": 150},
    "gates": {"steps": 150},
    "add-one": {},
    "l0": {"steps": 150},
}


def main() -> None:
    """Search, count, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=32)
    arguments = parser.parse_args()
    quiet()
    rows = [row for layers, kept in SHAPES for row in costs(layers, kept, arguments.questions)]
    values = {"questions": arguments.questions, "rows": rows, "published_tokens_28_layers": PUBLISHED}
    write_json(Path("benchmarks/results/search_cost.json"), {"command": "python benchmarks/search_cost.py", **values})
    for layers, kept in SHAPES:
        Console().print(table_of([row for row in rows if row["layers"] == layers], layers, kept))


def costs(layers: int, kept: int, questions: int) -> list[dict]:
    """One row a strategy: the sequences that it ran, how many of them backward, and tokens by context."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(open_teacher("tiny").folder)
    assert tokenizer
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Qwen3Config(vocab_size=len(tokenizer), num_hidden_layers=layers, head_dim=16, **sizes)
    model, _ = flashmorph.transplant(Qwen3ForCausalLM(config))
    style = STYLES["lines"]
    layouts = {split: Layout(tokenizer, style, Haystack(Corpus().pool(split, 0))) for split in ("train", "validation")}
    morphable, _ = flashmorph.attach(model, torch.randint(300, (2, LENGTH)))
    search = SearchSettings(length=LENGTH, batch_tokens=4 * LENGTH, micro_batch_tokens=8 * LENGTH, questions=questions)
    data = SearchData(layouts, style, [TaskSettings(task="many_keys", num_keys=4)], search)
    rows = []
    for name, settings in STRATEGIES.items():
        with tempfile.TemporaryDirectory() as folder:
            objective = MorphableObjective(morphable, data, Path(folder))
            cost = flashmorph.select(morphable, str(kept), name, objective, **settings).cost
        total = cost.tokens_forward + cost.tokens_backward
        sequences = total / LENGTH
        tokens = {context: sequences * length for context, length in CONTEXTS.items()}
        row = {"layers": layers, "kept": kept, "strategy": name, "settings": settings, "sequences": sequences}
        rows.append({**row, "backward_share": cost.tokens_backward / total, "tokens": tokens})
    return rows


def table_of(rows: list[dict], layers: int, kept: int) -> Table:
    """The rows of one shape on a screen."""
    table = Table(title=f"{kept} of {layers} layers stay full", title_justify="left")
    for column in ("strategy", "sequences", "backward", *(f"tokens at {context}" for context in CONTEXTS), "published"):
        table.add_column(column, justify="left" if column == "strategy" else "right")
    for row in rows:
        tokens = [f"{row['tokens'][context] / 1e6:.1f}M" for context in CONTEXTS]
        published = f"{PUBLISHED[row['strategy']] / 1e6:.0f}M" if layers == 28 and row["strategy"] in PUBLISHED else ""
        table.add_row(row["strategy"], f"{row['sequences']:,.0f}", f"{row['backward_share']:.0%}", *tokens, published)
    return table


if __name__ == "__main__":
    main()
