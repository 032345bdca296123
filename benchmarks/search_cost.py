"""What a search costs on 28 layers: a random model of that depth, K = 7; and on paper for a Qwen3-1.7B at 8K tokens.

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
from flashmorph.corpus import Corpus
from flashmorph.files import write_json
from flashmorph.selection.objective import MorphableObjective
from flashmorph.selection.searchdata import SearchData, SearchSettings
from flashmorph.tasks import STYLES, Haystack, Layout, TaskSettings
from flashmorph.teacher import load_tokenizer, open_teacher

LAYERS, KEPT, LENGTH, PAPER_LENGTH = 28, 7, 128, 8192
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
    torch.manual_seed(0)
    tokenizer = load_tokenizer(open_teacher("tiny").folder)
    assert tokenizer
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Qwen3Config(vocab_size=len(tokenizer), num_hidden_layers=LAYERS, head_dim=16, **sizes)
    model, _ = flashmorph.transplant(Qwen3ForCausalLM(config))
    style = STYLES["lines"]
    layouts = {split: Layout(tokenizer, style, Haystack(Corpus().pool(split, 0))) for split in ("train", "validation")}
    morphable, _ = flashmorph.attach(model, torch.randint(300, (2, LENGTH)))
    search = SearchSettings(
        length=LENGTH, batch_tokens=4 * LENGTH, micro_batch_tokens=8 * LENGTH, questions=arguments.questions
    )
    data = SearchData(layouts, style, [TaskSettings(task="many_keys", num_keys=4)], search)
    rows = []
    for name, settings in STRATEGIES.items():
        with tempfile.TemporaryDirectory() as folder:
            objective = MorphableObjective(morphable, data, Path(folder))
            cost = flashmorph.select(morphable, str(KEPT), name, objective, **settings).cost
        sequences = (cost.tokens_forward + cost.tokens_backward) / LENGTH
        rows.append(
            {
                "strategy": name,
                "settings": settings,
                "sequences": sequences,
                "backward_share": cost.tokens_backward / (cost.tokens_forward + cost.tokens_backward),
                "tokens_at_8k": sequences * PAPER_LENGTH,
            }
        )
    write_json(
        Path("benchmarks/results/search_cost.json"),
        {"command": "python benchmarks/search_cost.py", "questions": arguments.questions, "rows": rows},
    )
    table = Table(title=f"{KEPT} of {LAYERS} layers, {arguments.questions} questions", title_justify="left")
    for column in ("strategy", "sequences", "backward", "tokens at 8K"):
        table.add_column(column, justify="left" if column == "strategy" else "right")
    for row in rows:
        figures = (f"{row['sequences']:,.0f}", f"{row['backward_share']:.0%}", f"{row['tokens_at_8k'] / 1e6:.1f}M")
        table.add_row(row["strategy"], *figures)
    Console().print(table)


if __name__ == "__main__":
    main()
