"""Tasks of lm-evaluation-harness, by name or from a local YAML file, on a model that is already open.

The harness is the optional extra `eval`; nothing of it is imported before it is asked for.
"""

import importlib
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flashmorph.errors import UserError, first_line, unknown
from flashmorph.evaluation.greedy import greedy
from flashmorph.evaluation.intervals import paired_share_interval, ratio_interval, share_interval
from flashmorph.records import Figures, SettingValues

_PACKAGE = "lm_eval"
_OF_LIKELIHOOD: dict[str, Callable[[float], float]] = {
    "word_perplexity": lambda mean: math.exp(-mean),
    "byte_perplexity": lambda mean: math.exp(-mean),
    "bits_per_byte": lambda mean: -mean / math.log(2),
}
"""Metrics that the harness computes from sums of log-likelihoods and of words or bytes."""


@dataclass(frozen=True)
class HarnessFigure:
    """One metric of one task: `values` item by item, with their `weights` where the harness weighs them."""

    task: str
    metric: str
    value: float
    higher_is_better: bool
    values: list[float]
    weights: list[float] | None = None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval: Wilson's for yes and no, else a bootstrap over items; None where items have no figures."""
        if not self.values:
            return None
        return share_interval(self.values) if self._is_share else self._transformed(self.values)

    @property
    def _is_share(self) -> bool:
        """Whether items are right or wrong."""
        return self.weights is None and set(self.values) <= {0.0, 1.0}

    def minus(self, other: "HarnessFigure") -> Figures | None:
        """This figure less another model's, with the paired interval; a ratio where the metric is a perplexity."""
        if len(self.values) != len(other.values) or not self.values or self.weights != other.weights:
            return None
        differences = [one - two for one, two in zip(self.values, other.values, strict=True)]
        if self.metric.endswith("perplexity"):
            return {"ratio": self.value / other.value, "interval": self._transformed(differences)}
        if self._is_share and other._is_share:
            interval = paired_share_interval([self.values], [other.values])
        else:
            interval = self._transformed(differences)
        return {"difference": self.value - other.value, "interval": interval}

    def to_dict(self) -> Figures:
        """The JSON form."""
        figures = {"task": self.task, "metric": self.metric, "value": self.value, "interval": self.interval}
        return {**figures, "items": len(self.values), "higher_is_better": self.higher_is_better}

    def _transformed(self, values: Sequence[float]) -> tuple[float, float]:
        low, high = ratio_interval(np.asarray(values), np.asarray(self.weights or np.ones(len(values))))
        if self.weights is None:
            return low, high
        ends = sorted(map(_OF_LIKELIHOOD[self.metric], (low, high)))
        return ends[0], ends[1]


class Harness:
    """Tasks of the harness, found before any model is opened.

    Args:
        names: names of the harness's tasks, groups or tags, or paths of YAML files.
        metadata: handed to tasks that generate their own data, such as RULER's (`max_seq_lengths`).

    Raises:
        UserError: the harness is not installed, or a task is unknown (the nearest name is given).
    """

    def __init__(self, names: Sequence[str], metadata: SettingValues | None = None):
        try:
            self._manager_class = importlib.import_module(f"{_PACKAGE}.tasks").TaskManager
            self._wrapper = importlib.import_module(f"{_PACKAGE}.models.huggingface").HFLM
            self._run = importlib.import_module(_PACKAGE).simple_evaluate
        except ImportError as error:
            raise UserError(f"--tasks needs lm-evaluation-harness: pip install 'flashmorph[eval]' ({error})") from error
        logging.getLogger(_PACKAGE).setLevel(logging.ERROR)
        self._names = [self._checked_path(name) or name for name in names]
        self._metadata = metadata or {}
        named = [name for name, given in zip(self._names, names, strict=True) if name == given and not _is_yaml(name)]
        if named:
            known = self._manager({}).all_tasks
            for name in named:
                if name not in known:
                    raise UserError(unknown("task of lm-evaluation-harness", name, known))

    def scores(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, batch_size: int
    ) -> list[HarnessFigure]:
        """Every metric of every task; `folder` holds the tokenizer, for tasks that size their own data.

        Generation is greedy but for what a task itself asks for.

        Raises:
            UserError: a task cannot be run; the harness's own words are given.
        """
        metadata = {"pretrained": str(folder), **self._metadata}
        wrapped = self._wrapper(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        try:
            with greedy(model, tokenizer):
                found: Any = self._run(
                    model=wrapped,
                    tasks=list(self._names),
                    task_manager=self._manager(metadata),
                    bootstrap_iters=0,
                    metadata=metadata,
                )
        except Exception as error:
            raise UserError(
                f"lm-evaluation-harness cannot run {', '.join(self._names)}: {first_line(error)}"
            ) from error
        return [figure for task, results in found["results"].items() for figure in self._figures(task, results, found)]

    def _manager(self, metadata: SettingValues) -> Any:
        return self._manager_class(include_defaults=not all(map(_is_yaml, self._names)), metadata=metadata)

    @staticmethod
    def _checked_path(name: str) -> str | None:
        if not _is_yaml(name):
            return None
        if not Path(name).is_file():
            raise UserError(f"there is no task file {name!r}: give a YAML file or the name of a task")
        return str(Path(name).resolve())

    @staticmethod
    def _figures(task: str, results: Figures, found: Figures) -> list[HarnessFigure]:
        samples = (found.get("samples") or {}).get(task, [])
        better = found.get("higher_is_better", {}).get(task, {})
        figures = []
        for key, value in results.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            items = [each[metric] for each in samples if metric in each and each.get("filter", kind) == kind]
            weights = None
            if metric in _OF_LIKELIHOOD and items:
                items, weights = [float(one) for one, _ in items], [float(weight) for _, weight in items]
            elif not all(isinstance(one, int | float) for one in items):
                items = []
            elif items and not math.isclose(float(np.mean(items)), value, rel_tol=1e-6, abs_tol=1e-9):
                items = []  # A metric that is no mean of its items has no interval that could be drawn from them.
            figures.append(
                HarnessFigure(
                    task, metric, float(value), bool(better.get(metric, True)), [float(one) for one in items], weights
                )
            )
        return figures


def _is_yaml(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))
