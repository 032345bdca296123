"""The mixers that key-value heads can have in place of full attention, by the kind that `mixer_settings` names.

This file travels with every checkpoint: it imports torch and transformers only.
"""

from typing import Any

from .convolution_flashmorph import DynamicConv
from .dash_flashmorph import Dash
from .delta_flashmorph import GatedDeltaNet
from .linear_flashmorph import Linear
from .mamba2_flashmorph import Mamba2
from .mixer_flashmorph import OwnMixer
from .pooled_flashmorph import Pooled
from .thin_flashmorph import Thin
from .window_flashmorph import Window

MIXERS: dict[str, type[OwnMixer]] = {
    "window": Window,
    "linear": Linear,
    "gated_delta_net": GatedDeltaNet,
    "mamba2": Mamba2,
    "thin": Thin,
    "pooled": Pooled,
    "dash": Dash,
}
"""The class of each kind of mixer, as `mixer_settings` names it."""


def make_mixer(settings: dict[str, Any], heads: int, groups: int, head_dim: int, width: int) -> OwnMixer:
    """A mixer of `heads` key-value heads from its entry in `mixer_settings`; `conv` there are those of a `DynamicConv`.

    Raises:
        ValueError: there is no such kind.
    """
    own = dict(settings)
    kind, conv = own.pop("kind", None), own.pop("conv", None)
    if kind not in MIXERS:
        raise ValueError(f"there is no mixer of kind {kind!r}; there are {', '.join(MIXERS)}")
    mixer = MIXERS[kind](heads, groups, head_dim, width, **own)
    if conv is not None:
        mixer.conv = DynamicConv(heads, groups, head_dim, width, **conv)
    return mixer
