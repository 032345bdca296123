"""Long runs of text cut into lines: at sentence ends, else at spaces, else anywhere."""

import re
from collections.abc import Callable

SHARE = 20
"""The longest line as a share of the context: the most that a fact can be off its intended depth."""
_SENTENCE_ENDS = re.compile(r"[.!?…]+[\"'”’)\]]*\s+|[。！？｡]+[」』”’）]*\s*")
_SPACES = re.compile(r"\s+")


def broken(text: str, furthest: Callable[[int], int]) -> list[str]:
    """`text` in pieces without white space at their ends; a piece that begins at `begin` ends before `furthest(begin)`.

    The last piece keeps its end as it is.
    """
    pieces, begin = [], 0
    while (limit := max(begin + 1, furthest(begin))) < len(text):
        end = _last(_SENTENCE_ENDS, text, begin, limit) or _last(_SPACES, text, begin, limit) or limit
        pieces.append(text[begin:end].rstrip())
        begin = end
    pieces.append(text[begin:])
    return [piece for piece in pieces if piece.strip()] or pieces[-1:]


def _last(pattern: re.Pattern[str], text: str, begin: int, limit: int) -> int | None:
    """The end of the last match that has some text before it."""
    ends = [match.end() for match in pattern.finditer(text, begin, limit) if text[begin : match.start() + 1].strip()]
    return ends[-1] if ends else None
