"""Runs in vLLM's own environment: how its planner of the cache groups layers; JSON on standard output.

Reads pairs of numbers, full layers and layers with a state, from standard input.
"""

import json
import logging
import sys


def groups(full: int, switched: int) -> list[int]:
    """The widest group, the groups of full layers, and the others."""
    import torch
    from vllm.v1.core.kv_cache_utils import _get_kv_cache_groups_uniform_page_size as grouped
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec

    attention = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.bfloat16)
    page = attention.page_size_bytes
    state = MambaSpec(block_size=16, shapes=((8, 8),), dtypes=(torch.bfloat16,), page_size_padded=page)
    layers = {f"full.{number}": attention for number in range(full)}
    found = grouped({**layers, **{f"state.{number}": state for number in range(switched)}})
    kinds = [group.layer_names[0].startswith("full") for group in found]
    return [max(len(group.layer_names) for group in found), sum(kinds), len(kinds) - sum(kinds)]


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    json.dump([groups(*pair) for pair in json.load(sys.stdin)], sys.stdout)
