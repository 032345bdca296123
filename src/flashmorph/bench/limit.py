"""The limit: no computation is faster than its bytes can be moved and its operations be done on this machine."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from flashmorph.hosts import cache_bytes, mixing_operations

_TRIES = 5
_COPIED_BYTES = {"cpu": 2**27, "cuda": 2**30}
_MATMUL_SIDE = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True)
class Rates:
    """Bytes moved a second (read plus written, by a copy) and operations a second (by a square matrix product)."""

    bytes_per_second: float
    operations_per_second: float

    def best(self, other: "Rates") -> "Rates":
        """The higher of each."""
        return Rates(
            max(self.bytes_per_second, other.bytes_per_second),
            max(self.operations_per_second, other.operations_per_second),
        )

    def to_dict(self) -> dict[str, float]:
        """The JSON form."""
        return asdict(self)


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """The best of a few tries each, in this process and with its threads."""
    size = _COPIED_BYTES.get(device.type, _COPIED_BYTES["cpu"])
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    side = _MATMUL_SIDE.get(device.type, _MATMUL_SIDE["cpu"])
    left = torch.randn(side, side, device=device).to(dtype)
    copied = min(timed(lambda: target.copy_(source), device) for _ in range(_TRIES))
    multiplied = min(timed(lambda: left @ left, device) for _ in range(_TRIES))
    return Rates(2 * size / copied, 2 * side**3 / multiplied)


@dataclass(frozen=True)
class Limit:
    """The least bytes that a model moves and operations that it runs: weights `[bytes, operations a token]` and mixers.

    An embedding that is not tied to the head is not read as a whole, so it does not count.
    """

    model: PreTrainedModel
    rates: Rates

    def prefill(self, context: int) -> float:
        """Seconds for `context` tokens at once: every weight once, the cache written, logits of the last token."""
        head = 2 * self._head().numel()
        operations = context * (self._operations() - head) + head
        operations += context * mixing_operations(self.model.config, (context + 1) // 2)
        return self._seconds(self._bytes() + self._cache(context), operations)

    def decode(self, context: int) -> float:
        """Seconds for one token after `context` others: every weight and the whole cache once."""
        operations = self._operations() + mixing_operations(self.model.config, context)
        return self._seconds(self._bytes() + self._cache(context), operations)

    def _seconds(self, size: int, operations: int) -> float:
        return max(size / self.rates.bytes_per_second, operations / self.rates.operations_per_second)

    def _cache(self, context: int) -> int:
        return cache_bytes(self.model.config, context)

    def _weights(self) -> list[torch.Tensor]:
        table = cast(Any, self.model.get_input_embeddings()).weight
        return [weight for weight in self.model.parameters() if weight is not table or table is self._head()]

    def _head(self) -> torch.Tensor:
        return cast(Any, self.model.get_output_embeddings()).weight

    def _bytes(self) -> int:
        return sum(weight.numel() * weight.element_size() for weight in self._weights())

    def _operations(self) -> int:
        return 2 * sum(weight.numel() for weight in self._weights() if weight.ndim == 2)


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that `work` takes, until the device has done it."""
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
