"""Training stages: losses on top of `transformers.Trainer`."""

from flashmorph.stages.align import AlignSettings, align, alignment_errors
from flashmorph.stages.distill import DistillSettings, distill
from flashmorph.stages.extend import ExtendSettings, extend
from flashmorph.stages.training import TrainSettings, collate

__all__ = [
    "AlignSettings",
    "DistillSettings",
    "ExtendSettings",
    "TrainSettings",
    "align",
    "alignment_errors",
    "collate",
    "distill",
    "extend",
]
