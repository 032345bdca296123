"""RULER's tasks by name, with RULER's numbers."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from flashmorph.records import SettingValues
from flashmorph.tasks.ruler.counting import common_words, frequent_words
from flashmorph.tasks.ruler.needles import needles
from flashmorph.tasks.ruler.tracking import tracking
from flashmorph.tasks.ruler.written import Written

_LONG = 4096


@dataclass(frozen=True)
class Form:
    """One task: what writes it and with what, how many tokens it may be answered in, and its least haystack.

    With `has_depth` a single needle is asked for, so that its depth can be chosen.
    """

    write: Callable[..., Written]
    answer_tokens: int
    least: int
    settings: SettingValues = field(default_factory=dict)
    has_depth: bool = False

    def settings_at(self, length: int) -> SettingValues:
        """The arguments of its writer at a context length."""
        if self.write is common_words:
            return {"long": length >= _LONG}
        if self.write is frequent_words:
            return {"coded": max(5, length // 50)}
        return self.settings


def _niah(haystack: str, has_depth: bool = True, **settings: Any) -> Form:
    return Form(needles, 128, 1 if haystack == "text" else 4, {"haystack": haystack, **settings}, has_depth)


FORMS: dict[str, Form] = {
    "niah_single_1": _niah("repeat"),
    "niah_single_2": _niah("text"),
    "niah_single_3": _niah("text", value_kind="uuids"),
    "niah_multikey_1": _niah("text", num_keys=4),
    "niah_multikey_2": _niah("needle"),
    "niah_multikey_3": _niah("needle", key_kind="uuids", value_kind="uuids"),
    "niah_multivalue": _niah("text", False, num_values=4),
    "niah_multiquery": _niah("text", False, num_keys=4, num_queries=4),
    "vt": Form(tracking, 30, 6),
    "cwe": Form(common_words, 120, 11),
    "fwe": Form(frequent_words, 50, 27),
}
"""`niah_single_1` to `_3` are NIAH-S1 to S3: repeated sentences, text, and text with uuids as values."""
