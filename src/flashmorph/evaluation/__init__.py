"""Evidence: recall by generation, perplexity, cache."""

from flashmorph.evaluation.evaluate import EvaluateSettings, Score, evaluate, recall_difference
from flashmorph.evaluation.intervals import paired_interval, share_interval
from flashmorph.evaluation.perplexity import perplexity, text_losses
from flashmorph.evaluation.recall import answers_right

__all__ = [
    "EvaluateSettings",
    "Score",
    "answers_right",
    "evaluate",
    "paired_interval",
    "perplexity",
    "recall_difference",
    "share_interval",
    "text_losses",
]
