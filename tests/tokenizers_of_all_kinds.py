"""Small tokenizers of the kinds that teachers have: byte-level or with `▁` for spaces, special tokens before or not."""

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

_TEXT = [f"Document {number} says: a word, another word and {number * number}.\n" for number in range(60)]
_SPECIAL = ["<unk>", "<s>", "</s>", "<mask>"]
_TEMPLATES = {
    "none": None,
    "before": "<s> $A",
    "two before": "<mask> <s> $A",
    "around": "<s> $A </s>",
}


def byte_level() -> Tokenizer:
    """As GPT-2, Qwen and Llama 3 have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(_TEXT, _trainer(vocab_size=340, initial_alphabet=alphabet))
    return tokenizer


def metaspace() -> Tokenizer:
    """As Mistral has it: a `▁` before the first word."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(_TEXT, _trainer(vocab_size=120))
    return tokenizer


def sentencepiece() -> Tokenizer:
    """As Llama 2 and Phi-3 have it: the space in front is written by the normalizer, and stripped when decoded."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    tokenizer.train_from_iterator(_TEXT, _trainer(vocab_size=120))
    return tokenizer


def _trainer(**settings) -> trainers.BpeTrainer:
    return trainers.BpeTrainer(special_tokens=_SPECIAL, show_progress=False, **settings)


KINDS = {"byte-level": byte_level, "metaspace": metaspace, "sentencepiece": sentencepiece}
BEFORE = {"none": [], "before": ["<s>"], "two before": ["<mask>", "<s>"], "around": ["<s>"]}
"""What each template puts before a text."""


def make_tokenizer(kind: str, template: str = "none") -> PreTrainedTokenizerFast:
    """A tokenizer of one kind whose post-processor puts special tokens around a text."""
    tokenizer = KINDS[kind]()
    if written := _TEMPLATES[template]:
        special = [(name, tokenizer.token_to_id(name)) for name in _SPECIAL if name in written]
        tokenizer.post_processor = processors.TemplateProcessing(single=written, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", mask_token="<mask>"
    )
