"""The ways in which a decoder layer can pass information between tokens, one file each.

A new mixer is one file with one class; a host offers it as one line of its `mixers`.
"""

from flashmorph.mixers.full import FullAttention
from flashmorph.mixers.gated_delta_net import GatedDeltaNet
from flashmorph.mixers.mamba2 import Mamba2
from flashmorph.mixers.mixer import LAYER_TYPES, LINEAR, SLIDING, Kernels, Mixer, Products, gated
from flashmorph.mixers.window import SlidingWindow

__all__ = [
    "LAYER_TYPES",
    "LINEAR",
    "SLIDING",
    "FullAttention",
    "GatedDeltaNet",
    "Kernels",
    "Mamba2",
    "Mixer",
    "Products",
    "SlidingWindow",
    "gated",
]
