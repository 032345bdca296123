"""What a search for a quarter of the layers costs on 28 and 48 layers: random models of that depth, all else tiny; and
on paper for a Qwen3-1.7B, which has 28, by the context that it searches at.

    python benchmarks/search_cost.py

A random model's layers are worth next to nothing, so races find little to decide on: for them this is the dear case.
Writes `benchmarks/results/search_cost.json`.
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
from flashmorph.convert.load import load_tokenizer
from flashmorph.convert.teacher import open_teacher
from flashmorph.data.corpus import Corpus
from flashmorph.files import write_json
from flashmorph.selection.objective import MorphableObjective
from flashmorph.selection.search import own_settings
from flashmorph.selection.searchdata import SearchData, SearchSettings
from flashmorph.tasks import STYLES, Haystack, Layout, TaskSettings

DEPTHS, LENGTH = (28, 48), 128
PAPER_LENGTHS = {"2K": 2048, "4K": 4096, "8K": 8192}
STRATEGIES = ("budgeted-gates", "race", "nll", "greedy-forward", "gates", "l0")


def main() -> None:
    """Search, count, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=64)
    arguments = parser.parse_args()
    quiet()
    rows = [row for layers in DEPTHS for row in costs(layers, arguments.questions)]
    command = f"python benchmarks/search_cost.py --questions {arguments.questions}"
    write_json(Path("benchmarks/results/search_cost.json"), {"command": command, "rows": rows})
    table = Table(title=f"a quarter of the layers, {arguments.questions} questions", title_justify="left")
    for column in ("layers", "strategy", "sequences", "backward", *(f"tokens at {name}" for name in PAPER_LENGTHS)):
        table.add_column(column, justify="left" if column == "strategy" else "right")
    for row in rows:
        millions = [f"{tokens / 1e6:.1f}M" for tokens in row["tokens_at"].values()]
        figures = (str(row["layers"]), row["strategy"], f"{row['sequences']:,.0f}", f"{row['backward_share']:.0%}")
        table.add_row(*figures, *millions)
    Console().print(table)


def costs(layers: int, questions: int) -> list[dict]:
    """What each strategy's search for a quarter of so many layers costs: sequences, and tokens by their length."""
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
    for name in STRATEGIES:
        with tempfile.TemporaryDirectory() as folder:
            objective = MorphableObjective(morphable, data, Path(folder))
            cost = flashmorph.select(morphable, "25%", name, objective).cost
        tokens = cost.tokens_forward + cost.tokens_backward
        sequences = tokens / LENGTH
        rows.append(
            {
                "layers": layers,
                "strategy": name,
                "settings": own_settings(name),
                "sequences": sequences,
                "backward_share": cost.tokens_backward / tokens,
                "tokens_at": {context: sequences * length for context, length in PAPER_LENGTHS.items()},
            }
        )
    return rows


if __name__ == "__main__":
    main()
