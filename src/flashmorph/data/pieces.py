"""A long text in pieces, so that one big file has text for all splits."""

import re
from collections.abc import Iterator
from typing import TextIO

LONG, PIECE = 60_000, 20_000
"""Characters of a text that is cut, if it has more, and of its pieces."""
_EMPTY_LINE = re.compile(r"\n\s*\n")
_OTHER_ENDS = tuple(map(re.compile, (r"\n", r"[.!?…][\"'”’»)\]]*\s+|[。！？]", r"\s")))
"""Possible ends of a piece without an empty line: a line, else a sentence, else a word."""


def in_pieces(stream: TextIO) -> Iterator[str]:
    """The text of a stream: whole up to `LONG` characters; a longer one in pieces of `PIECE` characters or more.

    A piece ends with the first empty line behind its `PIECE` characters; if there is none for long, near them with a
    line, else a sentence, else a word, else anywhere. The pieces are the text, nothing left out.
    """
    text = ""
    while more := stream.read(4 * LONG):
        text, start = text + more, 0
        while len(text) - start > LONG:
            end = _end_of_piece(text, start)
            yield text[start:end]
            start = end
        text = text[start:]
    if text:
        yield text


def _end_of_piece(text: str, start: int) -> int:
    earliest = start + PIECE
    if match := _EMPTY_LINE.search(text, earliest, start + LONG):
        return match.end()
    matches = (end.search(text, earliest, earliest + PIECE) for end in _OTHER_ENDS)
    return next((match.end() for match in matches if match), earliest)
