"""Documents as tokens: one corpus, pass after pass; first tokens and tokens that are no targets are marked."""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from flashmorph.data.chat import NO_REPLY, Unfit, encode_chat
from flashmorph.data.corpus import Corpus, Position, no_text
from flashmorph.data.formats import Document
from flashmorph.errors import UserError
from flashmorph.tasks.encoded import EncodedText
from flashmorph.tokens.special_tokens import before_text, count_before

FIRST, IGNORED = np.uint32(1 << 31), np.uint32(1 << 30)
"""The bits of an id that mark the first token of a document, and a token that is no target of the loss."""
_TOGETHER, _AT_LEAST = 200_000, 200
_ENOUGH_UNFIT = 1_000
_REASONS = 3
_LOG = logging.getLogger(__name__)


class TooLittle(UserError):
    """The text would be repeated too often; rows packed so far are of no use."""


class Part:
    """One corpus, pass after pass: `made` of about `needed` tokens so far.

    Each text has the tokenizer's special tokens before it and the end-of-text token after it; a conversation has the
    tokens of its chat template. A prompt and its completion are tokenised as one text.
    """

    def __init__(
        self,
        corpus: Corpus,
        share: float,
        tokenizer: PreTrainedTokenizerBase,
        split: str,
        seed: int,
        max_passes: int | None = 1,
        needed: int = 0,
        whole_rows: int | None = None,
        learn_ends: bool = True,
    ):
        """Start at the first document.

        Args:
            corpus: The text.
            share: Its share of the tokens of a mixture, 0 to 1.
            tokenizer: The teacher's.
            split: Documents of this split only.
            seed: Of the order of documents, which differs from pass to pass.
            max_passes: How often the text may be read; None: as often as needed.
            needed: Tokens that are wanted of it, for messages.
            whole_rows: The length of a row in tokens: only documents that fill rows on their own are used, each as far
                as it fills them; None: all documents.
            learn_ends: Whether the token that ends a text is a target.
        """
        self.share, self.made, self.needed, self.passes = share, 0, needed, 0
        self._corpus, self._tokenizer, self._split, self._seed = corpus, tokenizer, split, seed
        self._max_passes, self._whole_rows, self._learn_ends = max_passes, whole_rows, learn_ends
        self._before = before_text(tokenizer)
        self._end: list[Any] = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        self._made_before = 0
        self._unfit: Counter[str] = Counter()
        self._position = Position()
        self._documents: Iterator[tuple[np.ndarray, Position]] | None = None

    @property
    def source(self) -> str:
        """The source of its text."""
        return self._corpus.source

    def once(self) -> Iterator[list[int]]:
        """The tokens of each document of one pass, no text twice.

        Raises:
            UserError: there is none, or the corpus cannot be read.
        """
        for tokens, _ in self._encoded(_once_each(self._corpus.read(self._split, self._seed))):
            self.made += len(tokens)
            yield (tokens & ~(FIRST | IGNORED)).tolist()
        if not self.made:
            raise self._none_so_long() if self._whole_rows and not self._unfit else self._no_text()

    def next(self) -> np.ndarray:
        """The tokens `[tokens]` of the next document, marked."""
        while True:
            if self._documents is None:
                self._begin_pass()
            assert self._documents is not None
            document = next(self._documents, None)
            if document is not None:
                tokens, self._position = document
                self.made += len(tokens)
                return tokens
            if self.made == self._made_before:
                raise self._none_so_long() if self._whole_rows and not self._unfit else self._no_text()
            self.passes, self._made_before = self.passes + 1, self.made
            self._position, self._documents = Position(), None

    def state(self) -> dict[str, Any]:
        """The position in the corpus, as JSON values."""
        return {
            "made": self.made,
            "made_before": self._made_before,
            "needed": self.needed,
            "passes": self.passes,
            "unfit": dict(self._unfit),
            "place": asdict(self._position),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        self.made, self._made_before, self.passes = state["made"], state["made_before"], state["passes"]
        self.needed, self._unfit = state["needed"], Counter(state["unfit"])
        self._position = Position(**state["place"])

    def report_left_out(self) -> None:
        """Log how many conversations were left out, if any, and why."""
        if number := self._unfit.total():
            _LOG.warning("%s: %s conversations were left out: %s", self.source, f"{number:,}", self._reasons())

    def _begin_pass(self) -> None:
        if self.passes == self._max_passes:
            size, most = self.made // self.passes, self._max_passes
            raise TooLittle(too_small(self._corpus, self._split, size, self.needed, most, self._whole_rows))
        documents = self._corpus.read(self._split, self._seed + self.passes, self._position)
        self._documents = self._encoded(documents)

    def _encoded(self, documents: Iterator[tuple[Document, Position]]) -> Iterator[tuple[np.ndarray, Position]]:
        """Marked tokens of each document; texts are tokenised in batches, which is faster."""
        while together := _some(documents):
            for document, _ in together:
                require_words(self._tokenizer, self._corpus, document)
            texts = [each.text for each, _ in together if each.messages is None and not self._corpus.replies_only]
            encoded = self._tokenizer(texts, add_special_tokens=False, verbose=False).input_ids if texts else []
            of_texts = iter(encoded)
            for document, position in together:
                if document.messages is not None:
                    ids, targets = self._encode_chat(document)
                elif self._corpus.replies_only:
                    ids, targets = self._encode_completion(document)
                else:
                    words = [*self._before, *next(of_texts)]
                    ids, targets = [*words, *self._end], None
                    if not self._learn_ends:
                        targets = [True] * len(words) + [False] * len(self._end)
                if ids and (size := self._taken_of(len(ids))):
                    yield marked(ids, targets, self._before)[:size], position

    def _taken_of(self, tokens: int) -> int:
        """How many of a document's tokens are used. Each row but the first also has the special tokens before them."""
        if not self._whole_rows:
            return tokens
        room = self._whole_rows - len(self._before)
        return self._whole_rows + (tokens - self._whole_rows) // room * room if tokens >= self._whole_rows else 0

    def _encode_completion(self, document: Document) -> tuple[list[int], list[bool]]:
        """The tokens of a text with a prompt, and which are targets: those that reach into its completion."""
        text = EncodedText(self._tokenizer, document.text)
        first, _ = text.reaching_into(document.prompt or 0, len(document.text))
        kept, ends = len(self._before) + first, [self._learn_ends] * len(self._end)
        return [*self._before, *text.ids, *self._end], [False] * kept + [True] * (len(text.ids) - first) + ends

    def _encode_chat(self, document: Document) -> tuple[list[int], list[bool] | None]:
        """The tokens of a conversation and which are targets; no tokens if it is unfit, which the first pass counts."""
        assert document.messages is not None
        replies_only, prompt = self._corpus.replies_only, document.prompt or 0
        try:
            return encode_chat(self._tokenizer, document.messages, replies_only, document.tools, prompt)
        except Unfit as error:
            if not self.passes:
                self._unfit[str(error)] += 1
            if self._unfit.total() >= _ENOUGH_UNFIT and not self.made:
                raise self._no_text() from error
            return [], None

    def _none_so_long(self) -> UserError:
        return UserError(
            f"{self._corpus.source} has no document of {self._whole_rows:,} tokens or more in the split "
            f"{self._split!r}: give longer documents, a shorter length, or `documents: joined`"
        )

    def _no_text(self) -> UserError:
        if not self._unfit:
            return no_text(self._corpus, self._split)
        number = self._unfit.total()
        if all(reason.startswith(NO_REPLY) for reason in self._unfit):
            finding = f"none of the {number:,} conversations that were tried has a reply to learn"
        else:
            finding = f"the teacher's chat template takes none of the {number:,} conversations that were tried"
        way_out = "; `loss_on: all` needs no replies to be found" if self._corpus.replies_only else ""
        return UserError(f"{self.source}: {finding}: {self._reasons()}{way_out}")

    def _reasons(self) -> str:
        """Why conversations were left out: the commonest reasons, with their numbers where there are several."""
        if len(self._unfit) == 1:
            return next(iter(self._unfit))
        return "; ".join(f"{number:,} since {reason}" for reason, number in self._unfit.most_common(_REASONS))


def too_small(
    corpus: Corpus, split: str, size: int, needed: int, max_passes: int | None, whole_rows: int | None = None
) -> str:
    """The message about a corpus that would be repeated too often.

    Args:
        corpus: The text.
        split: The split that is too small.
        size: Its tokens.
        needed: Tokens that a stage needs.
        max_passes: How often the text may be read.
        whole_rows: The least tokens of a document that is used; None: any.
    """
    long = f" in documents of at least {whole_rows:,}" if whole_rows else ""
    return (
        f"{corpus.source} is too small: it has about {size:,} tokens{long} for the split {split!r} and {needed:,} are "
        f"needed, more than {max_passes} times that; give more --data, fewer tokens, or --allow-repeat"
    )


def require_template(tokenizer: PreTrainedTokenizerBase, corpus: Corpus) -> None:
    """Refuse conversations if the teacher has no chat template.

    Raises:
        UserError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise UserError(
            f"{corpus.source} has conversations and the teacher's tokenizer has no chat template: give text, or an "
            "instruction-tuned teacher"
        )


def require_words(tokenizer: PreTrainedTokenizerBase, corpus: Corpus, document: Document) -> None:
    """Refuse a conversation if there is no chat template, and text if only replies are targets.

    Raises:
        UserError: names the source.
    """
    if document.messages is not None:
        require_template(tokenizer, corpus)
    elif corpus.replies_only and document.prompt is None:
        raise UserError(
            f"{corpus.source} has text, and `loss_on: replies` is for conversations, or texts with `prompt` and "
            "`completion`"
        )


def _some(documents: Iterator[tuple[Document, Position]]) -> list[tuple[Document, Position]]:
    """The next documents, of `_TOGETHER` characters or a little more in all."""
    some, size = [], 0
    while size < _TOGETHER and (pair := next(documents, None)):
        some.append(pair)
        size += max(_AT_LEAST, len(pair[0].text))
    return some


def _once_each(documents: Iterator[tuple[Document, Position]]) -> Iterator[tuple[Document, Position]]:
    """Each document once, however often the corpus has it."""
    seen: set[bytes] = set()
    for document, position in documents:
        digest = hashlib.sha256(repr(document).encode(errors="replace")).digest()
        if digest not in seen:
            seen.add(digest)
            yield document, position


def marked(ids: list[int], targets: list[bool] | None, before: list[int]) -> np.ndarray:
    """The tokens `[tokens]` of a document with their marks; special tokens before the text are no targets."""
    tokens = np.array(ids, np.uint32)
    tokens[0] |= FIRST
    if targets is not None:
        tokens[~np.array(targets)] |= IGNORED
    tokens[: count_before(ids, before)] |= IGNORED
    return tokens
