"""What models cost: time to read and to write, cache and memory, against the first model and against the machine."""

from flashmorph.bench.growth import Growth, crossing, exponent
from flashmorph.bench.kernels import kernels_of
from flashmorph.bench.limit import Limit, Rates, measure_rates
from flashmorph.bench.run import BenchSettings, bench

__all__ = ["BenchSettings", "Growth", "Limit", "Rates", "bench", "crossing", "exponent", "kernels_of", "measure_rates"]
