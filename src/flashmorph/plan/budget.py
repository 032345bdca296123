"""Budgets: a resource and the amount of it that a plan may use."""

import re
from dataclasses import dataclass

import numpy as np

from flashmorph.errors import UserError, quoted

_BYTES = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_LONGEST = 60
_FORMS = (
    "7 (layers), 25% (of the layers), heads=21 or heads=25% (key-value heads) or kv=64MiB@32768 (cache of one sequence "
    "of that many tokens)"
)


@dataclass(frozen=True)
class Budget:
    """A resource and the amount of it that a plan may use.

    `resource` is `layers` (a count, spent exactly), `share` (a share of the layers, rounded down, at least one),
    `heads` and `head_share` (the same of key-value heads), or `kv` (bytes of cache at `context` tokens, at most).
    """

    resource: str
    limit: float
    context: int | None = None

    @property
    def counts_heads(self) -> bool:
        """Whether it is spent on key-value heads one by one."""
        return self.resource in ("heads", "head_share")

    @property
    def is_share(self) -> bool:
        """Whether it is a share of all groups."""
        return self.resource in ("share", "head_share")

    @classmethod
    def parse(cls, text: str | int) -> "Budget":
        """Read `7`, `25%`, `heads=21`, `heads=25%` or `kv=64MiB@32768`.

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
        if self.resource == "heads":
            return f"heads={int(self.limit)}"
        return f"{'heads=' if self.counts_heads else ''}{_decimal(100 * self.limit)}%"


def _decimal(value: float) -> str:
    """All significant digits, without an exponent, so that `Budget.parse` reads the same value."""
    return np.format_float_positional(round(value, 12), trim="-")
