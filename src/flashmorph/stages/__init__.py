"""Training stages: losses on top of `transformers.Trainer`."""

from flashmorph.stages.align import AlignSettings, align, alignment_errors
from flashmorph.stages.distill import DistillSettings, distill
from flashmorph.stages.extend import ExtendSettings, extend
from flashmorph.stages.settings import TrainSettings
from flashmorph.stages.teacher_logits import RowsWithLogits, logits_on_disk, write_logits
from flashmorph.stages.training import collate, logged

__all__ = [
    "AlignSettings",
    "DistillSettings",
    "ExtendSettings",
    "RowsWithLogits",
    "TrainSettings",
    "align",
    "alignment_errors",
    "collate",
    "distill",
    "extend",
    "logged",
    "logits_on_disk",
    "write_logits",
]
