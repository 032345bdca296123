"""What vLLM on a CPU makes of our hybrids: tokens and log-probabilities against transformers (`make test-vllm`).

Greedy tokens alone are no test: a hybrid whose windows vLLM ignores may write the same ones.
"""

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from families import YARN, random_teacher

from flashmorph.convert.in_memory import transplant
from flashmorph.convert.load import load_model
from flashmorph.convert.save import save_model
from flashmorph.model.morphable import attach, build
from flashmorph.plan import Budget

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif("VLLM_PYTHON" not in os.environ, reason="VLLM_PYTHON names no Python with vLLM: make test-vllm"),
]
ANSWERS = Path(__file__).with_name("vllm_answers.py")
PROMPTS, NEW = (50, 77, 128, 200), 16
EXACT = 1e-4
"""The largest difference of log-probabilities in float32, in nats."""
NOISE = 1.2
"""Root mean square in bfloat16, in units of transformers' own between bfloat16 and float32."""
GRANITE = {"enable_prefix_caching": False}
"""vLLM's Mamba2 on a CPU fails with prefix caching."""
BY_TRANSFORMERS = {"model_impl": "transformers"}
"""vLLM's own class of Qwen2 and Qwen3 refuses windows by layer."""
SHAPE = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4}
WIDE = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4, "head_dim": 64}

YARN_512 = {**YARN, "original_max_position_embeddings": 128}

# Teacher in tests/families.py, changes of its shape, settings of the host, options of vLLM.
EXACT_CASES: dict[str, tuple[str, dict, dict, dict]] = {
    "granite, heads of 32": ("llama: grouped", {**SHAPE, "head_dim": 32}, {}, GRANITE),
    "granite, heads of 32, expand 1": ("llama: grouped", {**SHAPE, "head_dim": 32}, {"mamba_expand": 1}, GRANITE),
    "granite, heads of 64": ("llama: grouped", WIDE, {}, GRANITE),
    "granite of Qwen2, biases": ("qwen2: grouped", {**SHAPE, "head_dim": None}, {}, GRANITE),
    "granite, untied, llama3": ("llama: bias, untied, llama3", {**SHAPE, "head_dim": 32}, {}, GRANITE),
    "granite, yarn": ("qwen2: grouped", {**SHAPE, "head_dim": None, "rope_parameters": YARN_512}, {}, GRANITE),
    "windows of Qwen3": ("qwen3: grouped", {**SHAPE, "head_dim": 32}, {"window": 16}, BY_TRANSFORMERS),
    "windows of Qwen2": ("qwen2: grouped", {**SHAPE, "head_dim": None}, {"window": 16}, BY_TRANSFORMERS),
    "windows of Llama, as Ministral": ("llama: grouped", {**SHAPE, "head_dim": 32}, {"window": 16}, {}),
    "windows of SmolLM3": ("smollm3: grouped", {**SHAPE, "head_dim": None}, {"window": 16}, {}),
}
NOISY_CASES: dict[str, tuple[str, dict, dict, dict]] = {
    "qwen3.5, heads of 64": ("qwen3: grouped", WIDE, {}, {}),
    "qwen3.5-moe, heads of 64": ("qwen3_moe: grouped", WIDE, {}, {}),
}
BROKEN = {
    "windows that vLLM ignores": ("windows of Qwen3", lambda values: {"max_window_layers": 4}),
    "another layer full": (
        "windows of Llama, as Ministral",
        lambda values: {"layer_types": [values["layer_types"][-1], *values["layer_types"][:-1]]},
    ),
}


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(1, 90, (length,), generator=generator).tolist() for length in PROMPTS]


def hybrid(case: tuple[str, dict, dict, dict], folder: Path) -> Path:
    """A random teacher's hybrid with layers 1 and 2 full, as runs publish it."""
    name, shape, settings, _ = case
    origin = folder / "origin"
    shutil.rmtree(origin, ignore_errors=True)
    teacher = random_teacher(name, 3, vocab_size=96, **shape)
    teacher.save_pretrained(origin)
    model, _ = transplant(teacher, settings)
    morphable, _ = attach(model, torch.tensor(prompts()[0])[None])
    space = morphable.space(Budget("layers", 2))
    save_model(build(morphable, space.plan(["layers.1", "layers.2"], Budget("layers", 2))), folder / "model", origin)
    return folder / "model"


@torch.no_grad()
def computed(folder: Path, dtype: torch.dtype, texts: list[list[int]] | None = None) -> dict[str, list]:
    """transformers' greedy tokens, and its log-probabilities of prompt and tokens, or of `texts`."""
    model = load_model(folder, dtype)  # With our reference of Mamba2, which is several times as fast.
    tokens = []
    if texts is None:
        texts = []
        for prompt in prompts():
            ids = torch.tensor([prompt])
            whole = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, "do_sample": False}
            row = model.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, **whole)[0]
            tokens.append(row[len(prompt) :].tolist())
            texts.append(row.tolist())
    rows = []
    for text in texts:
        ids = torch.tensor([text])
        logs = model(ids).logits[0, :-1].float().log_softmax(-1)
        rows.append(logs.gather(1, ids[0, 1:, None])[:, 0].tolist())
    return {"tokens": tokens, "texts": texts, "logprobs": rows}


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(ANSWERS.parent / "vllm_site"),
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "TORCHDYNAMO_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
    }


@pytest.fixture(scope="module")
def known(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """Of each case the checkpoint, what transformers computes, and vLLM's answer, all from one process of vLLM."""
    found: dict[str, dict[str, Any]] = {}
    for name, case in (EXACT_CASES | NOISY_CASES).items():
        folder = hybrid(case, tmp_path_factory.mktemp("hybrid"))
        found[name] = {"folder": folder, "options": case[3], "dtype": "float32" if name in EXACT_CASES else "bfloat16"}
        found[name] |= computed(folder, torch.float32)
    for name, (whole, change) in BROKEN.items():
        folder = tmp_path_factory.mktemp("broken") / "model"
        shutil.copytree(found[whole]["folder"], folder)
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | change(values)))
        found[name] = {**found[whole], "folder": folder, "options": {}}
    found["windows of Qwen3 without a flag"] = {**found["windows of Qwen3"], "options": {}}
    jobs = [
        {
            "folder": str(each["folder"]),
            "dtype": each["dtype"],
            "options": each["options"],
            "prompts": prompts(),
            "texts": each["texts"],
            "new": NEW,
        }
        for each in found.values()
    ]
    output = tmp_path_factory.mktemp("answers") / "answers.json"
    command = [os.environ["VLLM_PYTHON"], ANSWERS, output]
    done = subprocess.run(command, input=json.dumps(jobs), text=True, env=environment(), capture_output=True)
    assert output.is_file(), done.stderr[-4000:]
    for each, answer in zip(found.values(), json.loads(output.read_text()), strict=True):
        each["vllm"] = answer
    return found


def differences(case: dict[str, Any]) -> torch.Tensor:
    """vLLM's log-probabilities minus transformers' in float32, of all positions."""
    assert "error" not in case["vllm"], case["vllm"]["error"]
    pairs = zip(case["vllm"]["logprobs"], case["logprobs"], strict=True)
    return torch.cat([torch.tensor(found) - torch.tensor(exact) for found, exact in pairs])


@pytest.mark.parametrize("name", EXACT_CASES)
def test_in_float32_tokens_and_log_probabilities_are_those_of_transformers(known, name):
    assert differences(known[name]).abs().max() < EXACT
    assert known[name]["vllm"]["tokens"] == known[name]["tokens"]


@pytest.mark.parametrize("name", NOISY_CASES)
def test_in_bfloat16_log_probabilities_differ_by_its_noise(known, name):
    case = known[name]
    rounded = computed(case["folder"], torch.bfloat16, case["texts"])["logprobs"]
    pairs = zip(rounded, case["logprobs"], strict=True)
    noise = torch.cat([torch.tensor(found) - torch.tensor(exact) for found, exact in pairs])
    assert differences(case).square().mean().sqrt() < NOISE * noise.square().mean().sqrt()


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_differs_from_a_right_one(known, name):
    assert differences(known[name]).abs().max() > 100 * EXACT


def test_windows_that_vllm_would_ignore_are_refused_by_it(known):
    """As we write them (`max_window_layers: 0`), its own class says no."""
    assert "error" in known["windows of Qwen3 without a flag"]["vllm"]


def test_the_server_answers_with_the_same_tokens(known):
    case = known["granite, heads of 32"]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    options = ["--model", case["folder"], "--dtype", "float32", "--host", "127.0.0.1", "--port", port]
    options += ["--no-enable-prefix-caching", "--enforce-eager", "--skip-tokenizer-init", "--max-model-len", 512]
    command = [os.environ["VLLM_PYTHON"], "-m", "vllm.entrypoints.openai.api_server", *options]
    server = subprocess.Popen(
        list(map(str, command)), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(180):
            try:
                urllib.request.urlopen(f"{address}/health", timeout=1)
                break
            except (urllib.error.URLError, OSError):
                assert server.poll() is None, server.stdout and server.stdout.read()[-3000:]
                time.sleep(1)
        asked = {"model": str(case["folder"]), "prompt": prompts()[0], "max_tokens": NEW, "temperature": 0}
        asked |= {"ignore_eos": True, "return_token_ids": True}
        request = urllib.request.Request(
            f"{address}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        answer = json.load(urllib.request.urlopen(request, timeout=120))
        assert answer["choices"][0]["token_ids"] == case["tokens"][0]
    finally:
        server.terminate()
        server.wait(timeout=60)
