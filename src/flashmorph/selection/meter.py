"""What a search spends, counted alike for every strategy."""

import time
from collections.abc import Iterable, Mapping
from functools import cache

from flashmorph.hosts import FEED_FORWARD, layer_products
from flashmorph.mixers.products import operations
from flashmorph.model.morphable import Morphable
from flashmorph.selection.strategy import Cost

Parts = Mapping[str, int]
"""How many layers run each option, and how many run at all (`FEED_FORWARD`)."""


class Meter:
    """Counts tokens and FLOPs of runs of a morphable model by the products that `flashmorph estimate` counts.

    The map to the vocabulary is left out: a question needs it for its answer alone.
    """

    def __init__(self, morphable: Morphable):
        self.cost = Cost()
        self._started = time.perf_counter()
        self._options, self._layers = morphable.options, len(morphable.layers)
        host, config = morphable.host, morphable.model.config
        self._products = cache(lambda part, length: layer_products(host, config, part, length))

    @property
    def every_branch(self) -> Parts:
        """A run with gates between 0 and 1."""
        return dict.fromkeys((*self._options, FEED_FORWARD), self._layers)

    def parts_of(self, layers: Iterable[Iterable[str]]) -> Parts:
        """A run through layers with these options; a layer whose heads have several runs each of them."""
        layers = [set(options) for options in layers]
        counts = {option: sum(option in options for options in layers) for option in self._options}
        return {**counts, FEED_FORWARD: len(layers)}

    def count(self, rows: int, length: int, parts: Parts, inputs: int = 0, weights: int = 0) -> None:
        """Count a run over `rows` of `length` tokens.

        Args:
            rows: Sequences.
            length: Tokens of each.
            parts: What runs.
            inputs: 1 where a backward through activations follows.
            weights: 1 where it gives gradients of the weights as well.
        """
        tokens = rows * length
        self.cost.tokens_forward += round(tokens * parts[FEED_FORWARD] / self._layers)
        self.cost.tokens_backward += round(tokens * inputs * parts[FEED_FORWARD] / self._layers)
        for part, number in parts.items():
            _, by_kernels = operations(self._products(part, length), 1, weights, inputs)
            self.cost.flops += number * by_kernels * tokens

    def resume(self, cost: Cost) -> None:
        """Go on counting from the cost of an interrupted search."""
        self.cost = cost
        self._started = time.perf_counter() - cost.seconds

    def look(self) -> Cost:
        """The cost so far, seconds included."""
        self.cost.seconds = time.perf_counter() - self._started
        return self.cost
