"""Morph a teacher in Python, stage by stage: what `flashmorph.morph` does, without its resuming and its evidence.

A few steps show the way in seconds; the default takes minutes:

    python examples/morph_in_python.py runs/by_hand --steps 20
"""

import argparse
from pathlib import Path

import torch

import flashmorph
from flashmorph import Haystack, Layout, SearchData, SearchSettings, TaskSettings

parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path, help="where work and result go")
parser.add_argument("--teacher", default="tiny")
parser.add_argument("--budget", default="25%", help="what may stay full")
parser.add_argument("--steps", type=int, default=300, help="steps of alignment, and of the search")
options = parser.parse_args()

teacher = flashmorph.open_teacher(options.teacher)
tokenizer, corpus, style = teacher.tokenizer(), flashmorph.Corpus("demo"), flashmorph.STYLES["lines"]

model, proof = flashmorph.transplant(teacher.load(torch.float32))
print(f"moved: logits differ by at most {proof.difference:.1e}")

settings = flashmorph.AlignSettings(tokens=options.steps * 2048, length=256, batch_tokens=2048, learning_rate=2e-3)
rows_file = options.folder / "rows.npy"
rows = flashmorph.pack(corpus, tokenizer, "train", settings.length, settings.rows, seed=0, path=rows_file)
morphable, errors = flashmorph.attach(model, torch.tensor([rows[row]["input_ids"] for row in range(8)]))
flashmorph.align(morphable, rows, settings, options.folder / "align")

layouts = {split: Layout(tokenizer, style, Haystack(corpus.pool(split, seed=0))) for split in ("train", "validation")}
tasks = [TaskSettings(task="many_keys", num_keys=8), TaskSettings(task="hops", num_chains=4)]
data = SearchData(layouts, style, tasks, SearchSettings(length=256, batch_tokens=1024))
objective = flashmorph.MorphableObjective(morphable, data, options.folder / "select")
selection = flashmorph.select(morphable, options.budget, objective=objective, steps=options.steps)

flashmorph.save_model(flashmorph.build(morphable, selection.plan), options.folder / "hybrid", teacher.folder)
print(f"{selection.plan.strip()}  written: {options.folder / 'hybrid'}")
