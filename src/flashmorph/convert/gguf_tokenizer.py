"""The tokenizer of a GGUF file: byte-level or SentencePiece's, built from the file's vocabulary as llama.cpp reads it.

transformers' own builder is not taken: it does not read `add_space_prefix`, puts no space before a text that begins
with one, cuts words that are tokens though no merge makes them, and gives special tokens beyond ASCII new ids.
"""

import importlib
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from flashmorph.errors import UserError, first_line

_WHOLE_WORDS = ("gpt-2", "olmo", "mpt", "phi-2", "jais")
_DIGITS_ALONE = ("smollm", "starcoder", "refact", "codeshell")
"""llama.cpp's names of GPT-2's split, and of it after every digit was cut off."""
_WORDS_FIRST = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken")
_WORDS_FIRST += ("jina-v5-nano",)
"""Here a word that is a token stays whole whatever the merges, and a text begins with bos unless the file says no."""
_COMPOSED = ("qwen2", "qwen35", "deepseek-r1-qwen")
"""Qwen's tokenizer composes letters with their accents (NFC), which a file does not say."""
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_DEFAULT_IDS = {"bos": 1, "eos": 2, "unk": 0}
"""What llama.cpp takes in a SentencePiece vocabulary where the file says nothing."""


def special_ids(fields: Mapping[str, Any]) -> dict[str, int | None]:
    """The ids of bos, eos, unk and pad; None where there is none."""
    defaults = _DEFAULT_IDS if fields.get("tokenizer.ggml.model") == "llama" else {}
    return {ours: fields.get(f"tokenizer.ggml.{name}_token_id", defaults.get(ours)) for ours, name in _SPECIAL.items()}


def tokenizer_of(file: object, fields: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer of a file's `fields` (name to value), with its chat template.

    Raises:
        UserError: a kind of vocabulary or a split of text that is not known here, or a vocabulary that is incomplete.
    """
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    needed = {"gpt2": ("tokens", "merges"), "llama": ("tokens", "scores")}.get(str(kind))
    if needed is None:
        raise UserError(f"{file} has tokenizer.ggml.model={kind}: gpt2 and llama are the ones that are known here")
    for name in needed:
        if f"tokenizer.ggml.{name}" not in fields:
            raise UserError(f"{file} has no tokenizer.ggml.{name}, so its text cannot be cut into tokens")
    tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(fields["tokenizer.ggml.tokens"])]
    ids = special_ids(fields)
    for name, index in ids.items():
        if index is not None and not 0 <= index < len(tokens):
            raise UserError(f"{file} has {index} as its {name} token, and {len(tokens):,} tokens")
    types = fields.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    split = _split(file, pre) if kind == "gpt2" else None
    added: list[AddedToken] = []
    try:
        if split:
            tokenizer = _byte_level(tokens, fields, split, pre)
        else:
            tokenizer = _sentencepiece(tokens, types, fields, tokens[ids["unk"] or 0])
        # Phi-3's own tokenizer takes space behind its special tokens with them, which a file does not say.
        strips = kind == "llama" and fields.get("general.architecture") == "phi3"
        for token, each in zip(tokens, types, strict=True):
            if each in (_CONTROL, _USER_DEFINED):
                rstrip = strips and token not in ("<unk>", "<s>", "<|endoftext|>")
                added.append(AddedToken(token, normalized=False, special=each == _CONTROL, rstrip=rstrip))
        tokenizer.add_tokens(added)
    except Exception as error:  # tokenizers raises no kind of its own.
        raise UserError(f"{file} has a vocabulary that does not hold together: {first_line(error)}") from error
    add_bos = fields.get("tokenizer.ggml.add_bos_token", kind == "llama" or pre in _WORDS_FIRST)
    plain = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        add_bos_token=bool(add_bos) and ids["bos"] is not None,
        add_eos_token=bool(fields.get("tokenizer.ggml.add_eos_token", False)) and ids["eos"] is not None,
        **{f"{name}_token": None if index is None else tokens[index] for name, index in ids.items()},
    )
    plain.chat_template = fields.get("tokenizer.chat_template")
    if len(plain) != len(tokens):
        raise UserError(f"{file} has {len(tokens):,} tokens, of which {len(plain):,} differ: their ids would be wrong")
    return plain


def _byte_level(
    tokens: list[str], fields: Mapping[str, Any], split: pre_tokenizers.PreTokenizer, pre: Any
) -> Tokenizer:
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    parts: dict[str, Any] = {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges, ignore_merges=pre in _WORDS_FIRST, **parts))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    if pre in _COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _split(file: object, name: str | None) -> pre_tokenizers.PreTokenizer:
    """How a byte-level vocabulary splits text before merges."""
    known = importlib.import_module("transformers.integrations.gguf.gguf_tokenizer_mapping").GGUF_PRE_TOKENIZER_SPLITS
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name in _WHOLE_WORDS:
        return whole
    if name in _DIGITS_ALONE:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), whole])
    if name not in known:
        raise UserError(
            f"{file} has tokenizer.ggml.pre={name}: how it splits text is not known here, so tokens would be wrong"
        )
    by_pattern = pre_tokenizers.Split(Regex(known[name]), behavior="isolated")
    return pre_tokenizers.Sequence([by_pattern, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _sentencepiece(tokens: list[str], types: list[int], fields: Mapping[str, Any], unknown: str) -> Tokenizer:
    """Merges in the order of the scores that they lead to, and bytes for what is no token.

    The space in front is a normaliser's, as in SentencePiece and llama.cpp: also before a text that begins with one.
    """
    vocabulary = {token: index for index, token in enumerate(tokens)}
    scores = dict(zip(tokens, fields["tokenizer.ggml.scores"], strict=True))
    # Only normal tokens are made by merging: `<0x0A>` in a text is six characters, no byte.
    others = [token for token, each in zip(tokens, types, strict=True) if each not in (0, _NORMAL)]
    merges = generate_merges(vocabulary, scores, others)
    model = BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    spaces: list[Any] = [normalizers.Replace(" ", "▁")]
    readable: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if fields.get("tokenizer.ggml.add_space_prefix", True):
        spaces.insert(0, normalizers.Prepend("▁"))
        readable.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence(readable)
    return tokenizer
