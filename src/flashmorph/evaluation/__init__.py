"""Evidence: recall by generation, perplexity, cache."""

from flashmorph.evaluation.evaluate import EvaluateSettings, Score, evaluate, perplexity_ratio, recall_difference
from flashmorph.evaluation.greedy import greedy
from flashmorph.evaluation.grid import ASKERS, Grid, GridRow, GridSettings, ask_grid, make_questions
from flashmorph.evaluation.intervals import paired_interval, paired_share_interval, ratio_interval, share_interval
from flashmorph.evaluation.perplexity import RangeLosses, shortage, text_in_words, text_losses
from flashmorph.evaluation.recall import answer_scores, answers_right
from flashmorph.evaluation.words import points, times

__all__ = [
    "ASKERS",
    "EvaluateSettings",
    "Grid",
    "GridRow",
    "GridSettings",
    "RangeLosses",
    "Score",
    "answer_scores",
    "answers_right",
    "ask_grid",
    "evaluate",
    "greedy",
    "make_questions",
    "paired_interval",
    "paired_share_interval",
    "perplexity_ratio",
    "points",
    "ratio_interval",
    "recall_difference",
    "share_interval",
    "shortage",
    "text_in_words",
    "text_losses",
    "times",
]
