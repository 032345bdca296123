"""Small tokenizers of every kind that teachers have, trained on a few lines."""

import json
import re
import string
from functools import cache

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

TEXT = [
    f"Line {line} of a text.\n\nIt is about nothing,\n  as {line * 7919 % 997} others are: {line * 104729}.\n"
    for line in range(60)
] + ["The secret number of the key is 48213. Question: What is it? Reply: @ name other:99 ? name:12,34\n"] * 20
SPECIAL = ["<unk>", "<s>", "</s>"]
CHAT = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>\n{{ message.content | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def _sentencepiece() -> Tokenizer:
    """Llama 2's: a space in front, taken off when decoded; bytes for what is unknown; no cut between words."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Split(Regex(r"\d|\n"), behavior="isolated")]
    )
    trained.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    tokens = dict.fromkeys([*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]])
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def _metaspace() -> Tokenizer:
    """T5's and XLNet's kind: line ends read as spaces."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    alphabet = [chr(code) for code in range(33, 127)]
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=SPECIAL, unk_token="<unk>", initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def _byte_level(pattern: str | None = None, trim_offsets: bool = True) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None, trim_offsets=trim_offsets)
    split = [pre_tokenizers.Split(Regex(pattern), behavior="isolated")] if pattern else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    return tokenizer


KINDS = {
    "sentencepiece": _sentencepiece,
    "metaspace": _metaspace,
    "byte level": _byte_level,
    "byte level, single digits": lambda: _byte_level(r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s*\n+|\s+"),
    "byte level, words joined": lambda: _byte_level(r"[^\n]{1,6}|\n"),
}
"""The last one joins the end of a question with the beginning of its answer."""
AROUND = {"nothing": "$A", "bos": "<s> $A", "bos and eos": "<s> $A </s>"}


@cache
def _trained(kind: str) -> str:
    return KINDS[kind]().to_str()


def teacher_tokenizer(kind: str, around: str = "bos", chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer of one of the `KINDS`, with one of `AROUND` a text."""
    tokenizer = Tokenizer.from_str(_trained(kind))
    special = [(token, number) for number, token in enumerate(SPECIAL)]
    template = processors.TemplateProcessing(single=AROUND[around], special_tokens=special)
    trimmed = [processors.ByteLevel(trim_offsets=True)] if kind.startswith("byte") else []
    tokenizer.post_processor = processors.Sequence([*trimmed, template])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=chat_template
    )


class SlowTokenizer(PreTrainedTokenizer):
    """A tokenizer in Python, which does not tell where its tokens stand: words with their space, and single signs."""

    def __init__(self, **settings):
        words = re.findall(r" ?[A-Za-z]+|[\s\S]", "\n".join(TEXT))
        self._pieces = list(dict.fromkeys([*SPECIAL, *words, *string.printable]))
        self._numbers = {piece: number for number, piece in enumerate(self._pieces)}
        super().__init__(bos_token="<s>", eos_token="</s>", unk_token="<unk>", **settings)

    @property
    def vocab_size(self) -> int:
        """The number of tokens."""
        return len(self._pieces)

    def get_vocab(self) -> dict[str, int]:
        """Tokens and their numbers."""
        return dict(self._numbers)

    def _tokenize(self, text, **_):
        words = re.findall(r" ?[A-Za-z]+|[\s\S]", text)
        return [piece for word in words for piece in ([word] if word in self._numbers else list(word))]

    def _convert_token_to_id(self, token):
        return self._numbers.get(token, 0)

    def _convert_id_to_token(self, index):
        return self._pieces[index]

    def convert_tokens_to_string(self, tokens):
        """The text of tokens."""
        return "".join(tokens)
