"""Greedy means greedy: what a checkpoint says about generation changes no answer of ours, and none of it is lost."""

import json

import pytest
import torch
from conftest import random_qwen3, tiny_tokenizer
from test_cli import broken_copy
from transformers import GenerationConfig

from flashmorph.convert.load import load_model
from flashmorph.convert.save import save_model, write_host
from flashmorph.convert.teacher import open_teacher
from flashmorph.evaluation import answer_scores, greedy
from flashmorph.pipeline.prompt import continue_prompt
from flashmorph.progress import silent
from flashmorph.tasks import Prompt
from flashmorph.tokens.special_tokens import end_tokens

TOKENIZER = tiny_tokenizer()
NEW = 12
FIELDS = [
    {"repetition_penalty": 1.8},
    {"num_beams": 3},
    {"num_beams": 4, "num_return_sequences": 3},
    {"do_sample": True, "temperature": 5.0, "top_k": 3, "top_p": 0.5, "min_p": 0.01, "typical_p": 0.5},
    {"temperature": 0.7},
    {"bad_words_ids": [[token] for token in range(20, 300)]},
    {"suppress_tokens": list(range(20, 300))},
    {"begin_suppress_tokens": list(range(20, 300))},
    {"min_new_tokens": 30},
    {"min_length": 400},
    {"forced_bos_token_id": 5},
    {"forced_eos_token_id": 5},
    {"guidance_scale": 3.0},
    {"max_length": 3},
    {"max_new_tokens": 1},
    {"max_time": 1e-9},
    {"cache_implementation": "static"},
    {"cache_implementation": "quantized"},
    {"use_cache": False},
    {"prompt_lookup_num_tokens": 4},
    {"assistant_early_exit": 1},
    {"watermarking_config": {"greenlist_ratio": 0.25, "bias": 9.0}},
    {"stop_strings": ["a", "e", "t"]},
    {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    {"no_repeat_ngram_size": 1},
    {"encoder_repetition_penalty": 2.0},
    {"exponential_decay_length_penalty": [1, 3.0]},
    {"sequence_bias": [[[30], 50.0]]},
    {"penalty_alpha": 0.6, "top_k": 4},
    {"dola_layers": "high"},
    {"prefill_chunk_size": 2},
    {"token_healing": True},
    {"num_beam_groups": 2, "num_beams": 2, "diversity_penalty": 0.5},
    {"something_of_its_own": 3},
]


@pytest.fixture(scope="module")
def model():
    return random_qwen3(vocab_size=len(TOKENIZER))


@pytest.fixture(scope="module")
def prompts(model):
    """Half of them right: the model's own words, and others."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(1, len(TOKENIZER), (length,), generator=generator).tolist() for length in (9, 30, 17)]
    found = []
    for ids in rows:
        made = list(ids)
        for _ in range(NEW):
            made.append(int(model(torch.tensor([made]), use_cache=False).logits[0, -1].argmax()))
        text = TOKENIZER.decode(made)[len(TOKENIZER.decode(ids)) :]
        found += [Prompt(ids, NEW, (text,)), Prompt(ids, NEW, (text + "never",))]
    return found


def saying(values: dict) -> GenerationConfig:
    return GenerationConfig.from_dict(values)


@pytest.mark.parametrize("values", FIELDS, ids=lambda values: ",".join(values))
def test_recall_is_the_same_whatever_the_file_says(model, prompts, values):
    own = saying(values)
    model.generation_config = own
    widths = []
    handle = model.register_forward_pre_hook(
        lambda _, __, given: widths.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        for batch_tokens in (1, 1000):
            widths.clear()
            assert answer_scores(model, TOKENIZER, prompts, batch_tokens) == [1, 0] * 3
            later = [width for width in widths if width == 1]
            batches = len(prompts) if batch_tokens == 1 else 1
            assert len(widths) - len(later) == batches and len(later) <= batches * (NEW - 1)
        assert model.generation_config is own
    finally:
        handle.remove()


def test_a_config_that_says_no_cache_changes_nothing(model, prompts):
    model.generation_config, model.config.use_cache = GenerationConfig(), False
    widths = []
    handle = model.register_forward_pre_hook(
        lambda _, __, given: widths.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    assert answer_scores(model, TOKENIZER, prompts) == [1, 0] * 3
    handle.remove()
    model.config.use_cache = True
    assert set(widths[1:]) == {1}


def test_the_checkpoints_own_words_return_after_an_error(model):
    own = model.generation_config = saying({"temperature": 0.6})
    with pytest.raises(KeyError), greedy(model, TOKENIZER) as config:
        assert model.generation_config is config
        raise KeyError
    assert model.generation_config is own


def test_answers_end_with_every_end_token_and_nothing_behind_is_read(model, prompts):
    """The first new token is named as an end: alone, by the configuration, then by the file in a list."""
    text = Prompt(prompts[0].input_ids, NEW, ("",), stop="never written")
    first = int(model(torch.tensor([text.input_ids])).logits[0, -1].argmax())
    whole = Prompt(prompts[0].input_ids, NEW, prompts[0].references, anywhere=True)
    other = prompts[2]
    for named in (first, [3, first]):
        model.generation_config = saying({"eos_token_id": named})
        assert first in end_tokens(TOKENIZER, model.config, model.generation_config)
        assert answer_scores(model, TOKENIZER, [text, other, whole]) == [
            1,
            answer_scores(model, TOKENIZER, [other])[0],
            0,
        ]
    model.generation_config = GenerationConfig()
    assert answer_scores(model, TOKENIZER, [text, whole]) == [0, 1]


@pytest.mark.parametrize(
    "values", FIELDS[:6] + [{"use_cache": False}, {"stop_strings": ["a"]}], ids=lambda v: ",".join(v)
)
def test_a_continued_prompt_is_greedy(teacher_folder, tmp_path, values):
    other = broken_copy(teacher_folder, tmp_path / "other")
    (other / "generation_config.json").write_text(json.dumps(values))
    texts = [
        continue_prompt(str(folder), "A line of text", 20, torch.device("cpu")) for folder in (teacher_folder, other)
    ]
    assert texts[0] == texts[1] != ""


SAID = [
    {"temperature": 0.6, "do_sample": False},
    {"num_beams": 1, "num_return_sequences": 2},
    {"top_p": 0.9, "temperature": 0.0, "do_sample": True},
    {"eos_token_id": [0, 5], "do_sample": True, "temperature": 0.6},
    {"use_cache": False, "cache_implementation": "static"},
    {"watermarking_config": {"greenlist_ratio": 0.25}, "bad_words_ids": [[3]]},
]


@pytest.mark.parametrize("values", SAID, ids=lambda values: ",".join(values))
def test_what_is_published_says_what_the_teacher_says(teacher_folder, tmp_path, values):
    """Written by the stage that moves the teacher, and by those that save a model that was trained."""
    folder = broken_copy(teacher_folder, tmp_path / "teacher")
    (folder / "generation_config.json").write_text(json.dumps(values))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "use_cache": False}))
    host = tmp_path / "host"
    write_host(open_teacher(str(folder)), host, {}, torch.device("cpu"), silent)
    model = load_model(host, torch.float32)
    save_model(model, tmp_path / "saved", folder)
    for place in (host, tmp_path / "saved"):
        written = json.loads((place / "generation_config.json").read_text())
        assert written == {**values, **({"use_cache": True} if "use_cache" in values else {})}
        assert json.loads((place / "config.json").read_text()).get("use_cache", True) is True
