"""The class of each token of a text, and the n-grams that occurred before it."""

import re
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

CONTENT, FUNCTION, DIGITS = "content words", "function words", "digits"
OPENING, CLOSING, SYMBOLS, SPACE = "opening brackets", "closing brackets", "other symbols", "white space"
KINDS = (CONTENT, FUNCTION, DIGITS, OPENING, CLOSING, SYMBOLS, SPACE)

_FUNCTION_WORDS = frozenset(
    """
    a about above across after against all along although am among an and another any anybody anyone anything are as at
    be because been before behind being below beneath beside between beyond both but by can cannot could despite did do
    does doing done down during each either enough every everybody everyone everything except few for from had has have
    having he her hers herself him himself his how however i if in inside into is it its itself less like many may me
    might mine more most much must my myself near neither no nobody none nor not nothing of off on once one onto or
    other others ought our ours ourselves out outside over own past per same shall she should since so some somebody
    someone something such than that the their theirs them themselves then there therefore these they this those though
    through throughout till to toward towards under unless unlike until up upon us was we were what whatever when
    whenever where wherever whether which whichever while who whoever whom whose why will with within without would yet
    you your yours yourself yourselves
    """.split()
)
"""The closed classes of English: articles, pronouns, prepositions, conjunctions, auxiliaries, quantifiers."""
_PARTS = re.compile(r"(?P<word>[^\W\d_]+(?:['’][^\W\d_]+)*)|(?P<digits>\d+)|(?P<space>\s+)|(?P<symbol>.)", re.DOTALL)


def pieces_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text of each token by itself, with the space in front that some tokenizers leave out of single tokens."""
    classes: dict[int, str] = {}
    for token in set(ids):
        text = str(tokenizer.decode([token]))
        marked = str(tokenizer.convert_ids_to_tokens(token)).startswith("▁")
        classes[token] = " " + text if marked and not text.startswith(" ") else text
    return [classes[token] for token in ids]


def kinds(pieces: Sequence[str]) -> list[str]:
    """The kind of each token: that of the word or character in which its first visible character stands."""
    text = "".join(pieces)
    by_character: list[str] = []
    for part in _PARTS.finditer(text):
        by_character += [_kind(part.lastgroup or "", part.group())] * len(part.group())
    found, start = [], 0
    for piece in pieces:
        visible = start + len(piece) - len(piece.lstrip())
        found.append(by_character[visible] if visible < start + len(piece) else SPACE)
        start += len(piece)
    return found


def _kind(group: str, text: str) -> str:
    if group == "word":
        return FUNCTION if text.lower() in _FUNCTION_WORDS else CONTENT
    if group == "symbol":
        return OPENING if text in "([{" else CLOSING if text in ")]}" else SYMBOLS
    return {"digits": DIGITS, "space": SPACE}[group]


def repeats(ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """For each token the length of the longest n-gram ending with it that occurred before, and how far back.

    Both `[time]`, in tokens; a token that is new has length 0 and distance 0. Of several earlier positions with the
    longest n-gram the last one counts.
    """
    tokens = np.asarray(ids)
    lengths, distances = np.zeros(len(tokens), dtype=int), np.zeros(len(tokens), dtype=int)
    before = np.zeros(0, dtype=int)
    for position in range(1, len(tokens)):
        # `runs[s]` is the length of the common end of the text up to here and the text up to s.
        runs = np.where(tokens[:position] == tokens[position], 1 + np.concatenate([[0], before]), 0)
        lengths[position] = runs.max()
        if lengths[position]:
            distances[position] = 1 + np.argmax(runs[::-1])
        before = runs
    return lengths, distances
