"""Budgets: a resource and the amount of it that a plan may use."""

import re
from dataclasses import dataclass, field, replace
from decimal import Decimal

import numpy as np

from flashmorph.errors import UserError, quoted
from flashmorph.plan.costs import Costs

_BYTES = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_LONGEST = 60
_FORMS = (
    "7 (layers), 25% (of the layers), heads=21 or heads=25% (key-value heads), kv=64MiB@32768 (cache of one sequence "
    "of that many tokens) or ms=4.2@32768 (milliseconds of a token generated after that many)"
)


@dataclass(frozen=True)
class Budget:
    """A resource and the amount of it that a plan may use.

    `resource` is `layers` (a count, spent exactly), `share` (a share of the layers, rounded down, at least one),
    `heads` and `head_share` (the same of key-value heads), `kv` (bytes of cache at `context` tokens, at most), or `ms`
    (microseconds of a token generated after `context` others, at most). What that takes is in `costs`, which the text
    of a budget does not have.
    """

    resource: str
    limit: float
    context: int | None = None
    costs: Costs | None = field(default=None, compare=False, repr=False)

    @property
    def counts_heads(self) -> bool:
        """Whether it is spent on key-value heads one by one."""
        return self.resource in ("heads", "head_share")

    @property
    def is_share(self) -> bool:
        """Whether it is a share of all groups."""
        return self.resource in ("share", "head_share")

    @property
    def is_amount(self) -> bool:
        """Whether it is an amount, spent at most, of what options cost; not a number of groups, spent exactly."""
        return self.resource in ("kv", "ms")

    @property
    def is_time(self) -> bool:
        """Whether it is spent on time, and so needs `costs`."""
        return self.resource == "ms"

    @property
    def kind(self) -> tuple[str, int | None]:
        """What options cost by: alike for all counts and shares, else the resource and its context."""
        return (self.resource, self.context) if self.is_amount else ("groups", None)

    @property
    def base(self) -> float:
        """The part of it that every plan takes."""
        return self.costs.base if self.costs else 0

    def priced(self, costs: Costs) -> "Budget":
        """The same with `costs`.

        Raises:
            UserError: they are those of another context.
        """
        if costs.context != self.context:
            raise UserError(
                f"budget {self} is about a context of {self.context:,} tokens and the costs about {costs.context:,} "
                f"({costs.origin}): behind the @ give {costs.context}, or measure or estimate them at {self.context}"
            )
        return replace(self, costs=costs)

    @classmethod
    def parse(cls, text: str | int) -> "Budget":
        """Read `7`, `25%`, `heads=21`, `heads=25%`, `kv=64MiB@32768` or `ms=4.2@32768`.

        Raises:
            UserError: the text has none of these forms, or the limit is not above 0.
        """
        text = str(text).strip()
        if len(text) > _LONGEST:
            raise UserError(f"budget {quoted(text)} is none of {_FORMS}")
        if match := re.fullmatch(r"(\d+)", text):
            budget = cls("layers", int(match[1]))
        elif match := re.fullmatch(r"(\d+(?:\.\d+)?)%", text):
            budget = cls("share", float(match[1]) / 100)
        elif match := re.fullmatch(r"heads=(\d+)", text):
            budget = cls("heads", int(match[1]))
        elif match := re.fullmatch(r"heads=(\d+(?:\.\d+)?)%", text):
            budget = cls("head_share", float(match[1]) / 100)
        elif match := re.fullmatch(r"kv=(\d+(?:\.\d+)?)([KMG]i?B|B)@(\d+)", text):
            budget = cls("kv", float(match[1]) * _BYTES[match[2]], int(match[3]))
        elif match := re.fullmatch(r"ms=(\d+(?:\.\d+)?)@(\d+)", text):
            budget = cls("ms", float(1000 * Decimal(match[1])), int(match[2]))
        elif text.startswith("loss="):
            raise UserError(
                f"budget {text!r} is no budget any more: a tolerated loss is a setting of the strategy `tolerance`, "
                "--strategy tolerance --set select.settings.tolerance=1%"
            )
        else:
            raise UserError(f"budget {text!r} is none of {_FORMS}")
        if budget.limit <= 0:
            raise UserError(f"budget {text!r} keeps nothing; it must be above 0, for example 25%")
        return budget

    def __str__(self) -> str:
        if self.resource == "layers":
            return str(int(self.limit))
        if self.resource == "kv":
            return f"kv={_decimal(self.limit)}B@{self.context}"
        if self.resource == "ms":
            return f"ms={_decimal(self.limit / 1000)}@{self.context}"
        if self.resource == "heads":
            return f"heads={int(self.limit)}"
        return f"{'heads=' if self.counts_heads else ''}{_decimal(100 * self.limit)}%"


def _decimal(value: float) -> str:
    """All significant digits, without an exponent, so that `Budget.parse` reads the same value."""
    return np.format_float_positional(round(value, 12), trim="-")
