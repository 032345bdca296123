"""The byte-level BPE of the embedded teachers: 1,536 tokens, every two-digit string one token.

Two digits a token make a six-digit value three tokens, so that an answer is a short sequence and not one lucky guess.
"""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY_SIZE = 1536
END_OF_TEXT = "<|endoftext|>"
PRE_TOKEN = r"\d{1,2}| ?[A-Za-z]+| ?[^\sA-Za-z\d]+|\n+| +(?=\S)|\s+"


def train_tokenizer(texts: Iterable[str], max_length: int) -> PreTrainedTokenizerFast:
    """Train on `texts` and on every two-digit string, often enough that each becomes one token.

    `max_length` (tokens) is what the teacher was trained to read.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PRE_TOKEN), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    digits = [f"{number:02d}" for number in range(100)] * 5_000
    tokenizer.train_from_iterator([*texts, " ".join(digits)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
