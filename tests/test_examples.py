"""The examples run as they are shown, only shorter."""

import subprocess
import sys
from pathlib import Path

import torch
from conftest import run_command
from transformers import AutoModelForCausalLM, AutoTokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_morphing_in_python_leaves_a_stock_checkpoint(tmp_path):
    command = [sys.executable, EXAMPLES / "morph_in_python.py", tmp_path, "--budget", "3", "--steps", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid")
    assert model.config.layer_types.count("full_attention") == 3
    assert model.config.layer_types.count("linear_attention") == 5
    prompt = AutoTokenizer.from_pretrained(tmp_path / "hybrid")("@ file class:", return_tensors="pt")
    assert torch.isfinite(model(**prompt).logits).all()


def test_the_example_of_generate_shows_recall(capsys):
    assert run_command("generate", "tiny", "--max-new-tokens", 8, "--prompt", "@ file class:482139\n? file class:") == 0
    assert "482139" in capsys.readouterr().out
