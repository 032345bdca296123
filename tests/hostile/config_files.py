"""A teacher's config.json, changed: values that are none, words that choose code, files that are no JSON."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hostile.harness import OUTPUT, Case
from hostile.seeds import in_turn
from hostile.teachers import SOUND, copy_of

KIND = "config.json"
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "max_position_embeddings")  # fmt: skip
NO_SIZES: list[Any] = ["32", "", "x" * 100_000, "\u202e\x1b[31m", -1, 0, -(2**63), 2**31, 10**18, 10**4000, True,
                       1.5, 1e308, float("nan"), float("inf"), [], [32], {}, {"a": 1}, [[[[]]]]]  # fmt: skip
NO_NUMBERS: list[Any] = ["1e-6", -1.0, 0, float("nan"), float("inf"), -float("inf"), True, [], {}, 10**400]
STRANGE: list[Any] = [None, *NO_SIZES, *NO_NUMBERS, "[/]", "\ud800", ["full_attention"] * 3, 7, "float32"]
KERNELS = ["kernels-community/x", "owner/repo", "owner/repo@main:f", "flash_attention_2", "paged|eager", "nonsense", 3,
           {"": "owner/repo"}]  # fmt: skip
WORDS = ["_attn_implementation", "attn_implementation", "_attn_implementation_internal", "experts_implementation",
         "_experts_implementation", "_experts_implementation_internal"]  # fmt: skip
INSISTED = [
    {"num_hidden_layers": 10_000},
    {"num_hidden_layers": 1_000_000},
    {"num_hidden_layers": 1_000_000, "layer_types": None},
    {"num_attention_heads": 5},
    {"num_key_value_heads": 3},
    {"layer_types": ["full_attention"]},
    {"layer_types": ["full_attention", 3]},
    {"layer_types": "full_attention"},
    {"layer_types": ["nothing_like_it"] * 2},
    {"layer_types": ["sliding_attention"] * 2, "use_sliding_window": True, "sliding_window": 8},
    {"dtype": "int8"},
    {"dtype": "complex64"},
    {"dtype": ["bfloat16"]},
    {"dtype": {"": "bfloat16"}},
    {"dtype": "nothing_like_it"},
    {"tie_word_embeddings": "yes"},
    {"tie_word_embeddings": 1},
    {"eos_token_id": "</s>"},
    {"eos_token_id": [1, "2"]},
    {"eos_token_id": 10**9},
    {"bos_token_id": -5},
    {"bos_token_id": True},
    {"pad_token_id": [0]},
    {"hidden_act": "gelu"},
    {"hidden_act": 3},
    {"architectures": "Qwen3ForCausalLM"},
    {"architectures": [3]},
    {"architectures": {"a": 1}},
    {"architectures": ["T5ForConditionalGeneration"]},
    {"model_type": "nothing_like_it"},
    {"model_type": ["qwen3"]},
    {"model_type": None},
    {"model_type": "x" * 10_000},
    {"model_type": "t5"},
    {"model_type": "gpt2"},
    {"is_encoder_decoder": True},
    {"vision_config": {}},
    {"quantization_config": {"quant_method": "gptq"}},
    {"attribute_map": {"vocab_size": "hidden_size"}},
    {"to_dict": 1},
    {"save_pretrained": None},
    {"validate_token_ids": []},
    {"__class__": "x"},
    {"per_layer_config": {"0": {"hidden_size": 8}}},
    {"rope_parameters": 3},
    {"rope_parameters": []},
    {"rope_parameters": {"rope_type": "nothing_like_it", "rope_theta": 1e4}},
    {"rope_parameters": {"rope_type": 3, "rope_theta": 1e4}},
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 0}},
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": float("nan")}},
    {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": "4"}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": float("inf")}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": -1}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
]
"""Changes that no teacher can have."""
HARMLESS = [
    *({word: value} for word in WORDS for value in KERNELS),
    {"pad_token_id": -1},
    {"use_cache": False},
    {"return_dict": False},
    {"output_attentions": True},
    {"output_hidden_states": True},
    {"num_labels": 10**9},
    {"id2label": 3},
    {"auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}},
    {"configuration_files": ["config.9.9.9.json"]},
    {"a_word_of_nobody": {"a": [1, None]}},
    {"transformers_version": 3},
]
"""Changes that choose nothing here."""


def generate(seed: int, number: int) -> Iterator[Case]:
    """So many changed configurations."""
    return in_turn(KIND, (_no_size, _no_number, _insisted, _strange, _harmless, _without, _broken), seed, number)


def _no_size(chance: random.Random) -> Case:
    key, value = chance.choice(SIZES), chance.choice(NO_SIZES)
    return _changed(chance, {key: value}, must_refuse=True)


def _no_number(chance: random.Random) -> Case:
    return _changed(chance, {"rms_norm_eps": chance.choice(NO_NUMBERS)}, must_refuse=True)


def _insisted(chance: random.Random) -> Case:
    return _changed(chance, chance.choice(INSISTED), "qwen3", must_refuse=True)


def _harmless(chance: random.Random) -> Case:
    return _changed(chance, chance.choice(HARMLESS), must_accept=True)


def _strange(chance: random.Random) -> Case:
    """Two keys of the file, whichever these are."""

    def change(values: dict[str, Any]) -> None:
        for key in chance.sample(sorted(values), 2):
            values[key] = chance.choice(STRANGE)

    return _case(chance, "two values", lambda values: change(values), chance.choice(list(SOUND)))


def _without(chance: random.Random) -> Case:
    """Some keys are not there, or in another's place."""

    def change(values: dict[str, Any]) -> None:
        for key in chance.sample(sorted(values), chance.randint(1, 4)):
            value = values.pop(key)
            if chance.random() < 0.2:
                values[chance.choice(sorted(values))] = value

    return _case(chance, "keys left out", change, chance.choice(list(SOUND)))


def _broken(chance: random.Random) -> Case:
    """What is not even a JSON object."""
    name, damage = chance.choice(list(DAMAGES.items()))

    def prepare(folder: Path) -> list[str]:
        path = copy_of("qwen3", folder / "t") / "config.json"
        path.write_bytes(damage(chance, path.read_bytes()))
        return _command(chance, folder)

    return Case(KIND, name, prepare, must_refuse=name not in ("a key twice", "spaces"))


def _cut(chance: random.Random, content: bytes) -> bytes:
    return content[: chance.randrange(len(content) - 2)]


def _flipped(chance: random.Random, content: bytes) -> bytes:
    place = chance.randrange(len(content))
    return content[:place] + b"\xff" + content[place + 1 :]


DAMAGES: dict[str, Callable[[random.Random, bytes], bytes]] = {
    "cut": _cut,
    "not UTF-8": _flipped,
    "empty": lambda chance, content: b"",
    "a byte order mark": lambda chance, content: b"\xef\xbb\xbf" + content,
    "UTF-16": lambda chance, content: content.decode().encode("utf-16"),
    "zero bytes": lambda chance, content: bytes(len(content)),
    "a list": lambda chance, content: b"[" + content + b"]",
    "null": lambda chance, content: b"null",
    "a string": lambda chance, content: json.dumps(content.decode()).encode(),
    "deep lists": lambda chance, content: b"[" * 100_000 + b"]" * 100_000,
    "deep objects": lambda chance, content: (
        b'{"model_type": "qwen3", "a": ' + b'{"a":' * 99_999 + b"1" + b"}" * 100_000
    ),
    "YAML": lambda chance, content: b"model_type: qwen3\n",
    "random bytes": lambda chance, content: chance.randbytes(500),
    "a key twice": lambda chance, content: b'{"hidden_size": "x",' + content[1:],
    "spaces": lambda chance, content: b" " * 5000 + content,
    "digits": lambda chance, content: b'{"hidden_size": ' + b"9" * 100_000 + b"}",
}


def _changed(
    chance: random.Random,
    changes: dict[str, Any],
    family: str = "",
    must_refuse: bool = False,
    must_accept: bool = False,
) -> Case:
    family = family or chance.choice(list(SOUND))
    return _case(
        chance, f"{family} {changes}"[:120], lambda values: values.update(changes), family, must_refuse, must_accept
    )


def _case(
    chance: random.Random,
    name: str,
    change: Callable[[dict[str, Any]], Any],
    family: str,
    must_refuse: bool = False,
    must_accept: bool = False,
) -> Case:
    def prepare(folder: Path) -> list[str]:
        path = copy_of(family, folder / "t") / "config.json"
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))
        (path.parent / "code.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
        return _command(chance, folder)

    return Case(KIND, name, prepare, must_refuse, must_accept, judge)


def _command(chance: random.Random, folder: Path) -> list[str]:
    """Mostly the cheap one, which reads config.json alone."""
    if chance.random() < 0.7:
        return ["estimate", str(folder / "t")]
    return ["transplant", str(folder / "t"), "--output", str(folder / OUTPUT)]


def judge(folder: Path) -> str:
    """What a move has left that must not be there: code, and words that name some."""
    out = folder / OUTPUT
    if not out.exists():
        return ""
    if others := [path.name for path in out.rglob("*") if path.suffix not in (".json", ".jinja", ".safetensors")]:
        return f"{others[0]} was brought along"
    written = (out / "config.json").read_text() + (out / "tokenizer_config.json").read_text()
    return next((f"{word} was written" for word in ("auto_map", "_implementation", "owner/") if word in written), "")
