"""What a run will take, from configuration and recipe alone: parameters, cache, operations, memory, hours.

Parameters and cache are exact; operations are counted as `torch.utils.flop_counter.FlopCounterMode` counts them;
memory and hours are estimates whose formulas `explain.explain` gives.
"""

from flashmorph.estimate.costs import estimated_costs
from flashmorph.estimate.estimate import CONTEXTS, Estimate, estimate
from flashmorph.estimate.gpus import Gpu, find_gpu

__all__ = ["CONTEXTS", "Estimate", "Gpu", "estimate", "estimated_costs", "find_gpu"]
