"""Cost of models: prefill and decode time, cache and memory, against the first model and the machine's limits."""

from flashmorph.bench.costs import measure_costs, model_for_costs, source_here, time_tokens
from flashmorph.bench.growth import crossing, exponent, spread
from flashmorph.bench.limit import Limit, Rates, measure_rates
from flashmorph.bench.run import BenchSettings, bench
from flashmorph.bench.timing import Timing, timing_in_words

__all__ = [
    "BenchSettings",
    "Limit",
    "Rates",
    "Timing",
    "bench",
    "crossing",
    "exponent",
    "measure_costs",
    "measure_rates",
    "model_for_costs",
    "source_here",
    "spread",
    "time_tokens",
    "timing_in_words",
]
