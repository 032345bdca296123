"""flashmorph's own model type: hybrids whose key-value heads have mixers of their own.

Importing this registers `flashmorph` with transformers' auto classes, so that `AutoModelForCausalLM.from_pretrained`
opens a hybrid without `trust_remote_code`. The other files here travel with every checkpoint and import nothing of
flashmorph but each other: with `trust_remote_code=True` a checkpoint opens where flashmorph is not installed.
"""

from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM

from flashmorph.own.configuration_flashmorph import FORMAT, FlashmorphConfig
from flashmorph.own.dash_flashmorph import VARIANTS, Dash
from flashmorph.own.mixer_flashmorph import OwnMixer, start
from flashmorph.own.modeling_flashmorph import CACHE, FlashmorphAttention, FlashmorphForCausalLM
from flashmorph.own.pooled_flashmorph import pooled_after
from flashmorph.own.states_flashmorph import StateMixer
from flashmorph.own.thin_flashmorph import held_after

TRAVELLING = tuple(sorted(Path(__file__).parent.glob("*_flashmorph.py")))
"""The files that a checkpoint needs beside transformers."""
AUTO_MAP = {
    "AutoConfig": "configuration_flashmorph.FlashmorphConfig",
    "AutoModelForCausalLM": "modeling_flashmorph.FlashmorphForCausalLM",
}
"""The entry in config.json by which transformers finds the classes in these files."""

AutoConfig.register(FlashmorphConfig.model_type, FlashmorphConfig)
AutoModelForCausalLM.register(FlashmorphConfig, FlashmorphForCausalLM)
FlashmorphConfig.register_for_auto_class()
FlashmorphForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = [
    "AUTO_MAP",
    "CACHE",
    "FORMAT",
    "TRAVELLING",
    "VARIANTS",
    "Dash",
    "FlashmorphAttention",
    "FlashmorphConfig",
    "FlashmorphForCausalLM",
    "OwnMixer",
    "StateMixer",
    "held_after",
    "pooled_after",
    "start",
]
