"""Cloze tasks for lm-evaluation-harness, made of local text: the last word of a passage that has it before.

    python benchmarks/cloze.py --data runs/text --output runs/cloze
    flashmorph evaluate TEACHER HYBRID --data runs/text --tasks runs/cloze/cloze_near.yaml,runs/cloze/cloze_far.yaml

Passages are of documents of the test split, which no stage trains on. The last word is in few documents, and not the
first of a sentence. In `cloze_near` it stands among the last `--near` words before, so that a window has it; in
`cloze_far` it stands only more than `--far` words before. (In the manner of LAMBADA, arXiv 1606.06031, whose passages
are shorter and were chosen by people.)
"""

import argparse
import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from flashmorph.data.corpus import Corpus
from flashmorph.files import atomic_path, write_json

KINDS = ("near", "far")
_WORD = re.compile(r"[A-Za-z]{5,}")
_ENDS_SENTENCE = re.compile(r"[.!?:;\"”’)\]]$")
_RARE = 0.01
"""The largest share of the documents that a last word may be in."""


def main() -> None:
    """Write both tasks and their questions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="demo", help="text, as flashmorph's --data")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=200, help="of each task")
    parser.add_argument("--each", type=int, default=4, help="questions of one document, at most")
    parser.add_argument("--words", type=int, default=500, help="of a passage")
    parser.add_argument("--near", type=int, default=50)
    parser.add_argument("--far", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    documents = [text.split() for text in Corpus(arguments.data).documents("test", arguments.seed)]
    common = Counter(word for words in documents for word in set(map(_bare, words)))
    rare = {word for word, times in common.items() if word and times <= max(1, _RARE * len(documents))}
    rng = random.Random(arguments.seed)
    rng.shuffle(documents)
    items: dict[str, list[dict[str, str]]] = {kind: [] for kind in KINDS}
    for words in documents:
        found: dict[str, list[int]] = {kind: [] for kind in KINDS}
        for kind, end in _ends(words, rare, arguments.words, arguments.near, arguments.far):
            found[kind].append(end)
        for kind, ends in found.items():
            for end in rng.sample(ends, min(len(ends), arguments.each, arguments.questions - len(items[kind]))):
                context = " ".join(words[end - arguments.words : end])
                items[kind].append({"context": context, "word": _bare(words[end])})
    for kind, rows in items.items():
        path = arguments.output / f"cloze_{kind}.jsonl"
        _write(path, "".join(json.dumps(row) + "\n" for row in rows))
        _write(path.with_suffix(".yaml"), yaml.safe_dump(_task(kind, path), sort_keys=False))
        print(f"{path.with_suffix('.yaml')}: {len(rows)} questions of {len(documents)} documents")
    write_json(arguments.output / "cloze.json", {name: str(value) for name, value in vars(arguments).items()})


def _ends(words: Sequence[str], rare: set[str], length: int, near: int, far: int) -> Iterator[tuple[str, int]]:
    """Positions in a document at which a passage of so many words can end, each with its kind."""
    last: dict[str, int] = {}
    for position, raw in enumerate(words):
        word = _bare(raw)
        before = last.get(word)
        last[word] = position
        if position < length or before is None or before < position - length or word not in rare:
            continue
        if not raw.startswith(word) or _ENDS_SENTENCE.search(words[position - 1]):
            continue
        if position - before <= near:
            yield "near", position
        elif position - before > far:
            yield "far", position


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def _bare(word: str) -> str:
    """The letters of a word; empty where it has too few to be asked for."""
    match = _WORD.search(word)
    return match[0] if match else ""


def _task(kind: str, path: Path) -> dict[str, object]:
    """The harness's description of a task."""
    metrics = [("acc", True), ("perplexity", False)]
    return {
        "task": f"cloze_{kind}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path.resolve())}},
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "{{context}}",
        "doc_to_target": " {{word}}",
        "metric_list": [
            {"metric": name, "aggregation": "mean" if name == "acc" else name, "higher_is_better": better}
            for name, better in metrics
        ],
        "metadata": {"version": 1.0},
    }


if __name__ == "__main__":
    main()
