"""The cache that vLLM allocates: layers of one kind in groups of one size, pages of one size for all of them.

Arithmetic of vLLM 0.32 (`v1/core/kv_cache_utils.py`, `v1/kv_cache_interface.py`, `platforms/interface.py`), for one GPU
and without speculative decoding. Every group takes blocks for itself, and a block has a page for each of `Groups.size`
layers, whether the group has that many or not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from flashmorph.hosts.host import Host
from flashmorph.mixers import GatedDeltaNet, Mamba2, SlidingWindow
from flashmorph.mixers.products import attention_cache_bytes, number_bytes
from flashmorph.plan import FULL

BLOCK_TOKENS = 16
"""Tokens of a block of attention on a GPU, before it is made as large as a state; on a CPU 128."""
STATE_PAGES = 2
"""Pages of a sequence that a state takes with prefix caching, which is on unless it is turned off; else it is one."""
_NEARLY_EQUAL = 1.5


@dataclass(frozen=True)
class Groups:
    """Groups of `size` layers: `full` groups of full layers, `switched` of others; `padded` layers hold nothing."""

    size: int
    full: int
    switched: int
    padded: int


@dataclass(frozen=True)
class Pages:
    """A page is what one block holds of one layer: `page_bytes` for `block_tokens` tokens, or one state.

    A switched layer takes `state_pages` of each sequence, or those of its `window` in tokens.
    """

    block_tokens: int
    page_bytes: int
    state_pages: int = 0
    window: int = 0

    def switched(self, context: int) -> int:
        """Pages of a switched layer for a sequence of `context` tokens, while it generates."""
        # One more than the window fills: it may begin inside a block.
        return _ceil(min(self.window, context), self.block_tokens) + 1 if self.window else self.state_pages


@dataclass(frozen=True)
class VllmCache:
    """The cache of a model in vLLM: `groups` of layers and their `pages`."""

    groups: Groups
    pages: Pages

    def sequence_bytes(self, context: int) -> int:
        """Bytes that one sequence of `context` tokens takes, padding and all."""
        blocks = self.groups.full * _ceil(context, self.pages.block_tokens)
        blocks += self.groups.switched * self.pages.switched(context)
        return blocks * self.groups.size * self.pages.page_bytes


def group_layers(full: int, switched: int) -> Groups:
    """How vLLM groups layers of two kinds: as many in a group as the rarer kind has.

    Where there are less than 1.5 times as many of the other kind, it is as many as that has.

    Raises:
        ValueError: a count is negative, or both are 0.
    """
    if min(full, switched) < 0 or not full + switched:
        raise ValueError(f"no layers of {full} full and {switched} switched ones")
    counts = [count for count in (full, switched) if count]
    size = max(counts) if max(counts) < _NEARLY_EQUAL * min(counts) else min(counts)
    groups = [_ceil(count, size) for count in (full, switched)]
    return Groups(size, groups[0], groups[1], size * sum(groups) - full - switched)


def pages_of_states(
    token_bytes: int, state_bytes: int, block_tokens: int = BLOCK_TOKENS, state_pages: int = STATE_PAGES
) -> Pages:
    """Pages where switched layers have a state of `state_bytes`, and attention `token_bytes` a token and layer.

    A block is made so long that a page holds a state, and a state is padded to the page.
    """
    block_tokens *= _ceil(state_bytes, block_tokens * token_bytes)
    return Pages(block_tokens, block_tokens * token_bytes, state_pages=state_pages)


def unpadded(layers: int) -> list[int]:
    """The numbers of full layers, of this many, at which no layer is padded; one of each kind at least."""
    return [full for full in range(1, layers) if not group_layers(full, layers - full).padded]


def nearby(layers: int, full: int) -> list[int]:
    """Of `unpadded`, the next one below `full` and the next one above it, as far as there are any."""
    choices = unpadded(layers)
    return [*[count for count in choices if count < full][-1:], *[count for count in choices if count > full][:1]]


def in_words(groups: Groups, full: int, switched: int) -> str:
    """A sentence on the padding of a plan, and on the nearest numbers of full layers without."""
    kinds = f"vLLM keeps {full} full and {switched} other layers in groups of {groups.size}"
    near = " or ".join(map(str, nearby(full + switched, full)))
    if not groups.padded:
        return f"{kinds}: no layer is padded, nor with {near} full ones." if near else f"{kinds}: no layer is padded."
    layers = full + switched + groups.padded
    return f"{kinds}: {groups.padded} of {layers} layers are padding; none with {near} full ones."


def vllm_cache(
    host: Host,
    config: PreTrainedConfig,
    options: Sequence[str],
    block_tokens: int = BLOCK_TOKENS,
    state_pages: int = STATE_PAGES,
) -> VllmCache | None:
    """The cache of a host's model with these options of its layers; None where vLLM does not serve it.

    The state is in the checkpoint's dtype, unless its configuration has another `mamba_ssm_dtype`.
    """
    if not any(engine.name == "vLLM" and engine.fits(config) for engine in host.engines):
        return None
    full = list(options).count(FULL)
    groups = group_layers(full, len(options) - full)
    mixer = next(mixer for option, mixer in host.mixers.items() if option != FULL)
    token_bytes, values = attention_cache_bytes(config, 1), host.serialise(config.to_dict())
    if isinstance(mixer, SlidingWindow) or full == len(options):
        pages = Pages(block_tokens, block_tokens * token_bytes, window=values.get("sliding_window") or 0)
    elif isinstance(mixer, (GatedDeltaNet, Mamba2)):
        pages = pages_of_states(token_bytes, _state_bytes(mixer, config, values), block_tokens, state_pages)
    else:
        return None
    return VllmCache(groups, pages)


def _state_bytes(mixer: GatedDeltaNet | Mamba2, config: PreTrainedConfig, values: dict[str, Any]) -> int:
    """Bytes of one layer's state there: inputs of all taps of the convolution but one, and the recurrent state."""
    channels, taps, numbers = mixer.state_numbers(config)
    recurrent = 4 if values.get("mamba_ssm_dtype") == "float32" else number_bytes(config)
    return channels * (taps - 1) * number_bytes(config) + numbers * recurrent


def _ceil(number: int, step: int) -> int:
    return -(-number // step)
