"""Every family of teachers goes the whole way: one table, one body."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import run_command, tiny_tokenizer
from families import FAMILIES, ONE_OF_EACH_FAMILY, random_teacher
from test_morphable import close, logits
from test_objective import objective_on
from test_training import rows_in, settings_of

from flashmorph.convert.in_memory import transplant
from flashmorph.convert.load import load_model
from flashmorph.convert.save import save_model
from flashmorph.hosts import HOSTS, configure
from flashmorph.losses import Head
from flashmorph.model.morphable import Morphable, attach, build
from flashmorph.pipeline.card import served_by
from flashmorph.plan import Budget
from flashmorph.selection.meter import Meter
from flashmorph.selection.search import select
from flashmorph.stages import AlignSettings, DistillSettings, align, alignment_errors, distill

VOCABULARY = 97


def hybrid_of(teacher: str) -> tuple[Morphable, torch.nn.Module]:
    """A morphable model of three layers, and a hybrid of it whose middle layer is full."""
    model, _ = transplant(random_teacher(teacher, 1, num_hidden_layers=3))
    morphable, _ = attach(model, torch.randint(VOCABULARY, (4, 48)))
    budget = Budget("layers", 1)
    return morphable, build(morphable, morphable.space(budget).plan(["layers.1"], budget))


def test_the_table_has_every_family_that_a_host_takes():
    assert sorted(FAMILIES) == sorted(family for host in HOSTS for family in host.teachers)


@pytest.mark.parametrize("teacher", ONE_OF_EACH_FAMILY)
def test_the_whole_way(teacher, tmp_path):
    original = random_teacher(teacher, 1, vocab_size=len(tiny_tokenizer()))
    original.save_pretrained(tmp_path / "teacher")
    model, proof = transplant(original)
    assert proof.difference <= proof.tolerance
    morphable, start = attach(model, rows(tmp_path))
    assert all(0 < error < 1 for error in start)
    align(morphable, rows_in(tmp_path), settings_of(AlignSettings, steps=8), tmp_path / "align")
    assert sum(alignment_errors(morphable, rows(tmp_path))) < sum(start)
    objective = objective_on(morphable, tmp_path / "select")
    found = select(morphable, "1", "budgeted-gates", objective, steps=2)
    assert len(found.plan.full_layers) == 1
    hybrid = build(morphable, found.plan)
    before = logits(hybrid, rows(tmp_path))
    distill(hybrid, model, rows_in(tmp_path), settings_of(DistillSettings, steps=2), tmp_path / "distill")
    assert not close(logits(hybrid, rows(tmp_path)), before)
    save_model(hybrid, tmp_path / "hybrid", tmp_path / "teacher")
    assert torch.equal(logits(load_model(tmp_path / "hybrid", "auto"), rows(tmp_path)), logits(hybrid, rows(tmp_path)))


def rows(folder: Path) -> torch.Tensor:
    held = rows_in(folder)
    return torch.tensor([held[row]["input_ids"] for row in range(8)])


@pytest.mark.parametrize("head_dim", [8, 16])
def test_the_card_says_which_engine_answers_nonsense(head_dim, capsys):
    """vLLM reads no head_dim of a Granite hybrid: heads that do not fill the width load, and compute something else."""
    host, config = configure(random_teacher("llama: grouped", head_dim=head_dim).config)
    (vllm,) = [engine for engine in host.engines if engine.name == "vLLM"]
    line = served_by(vllm, config)
    assert ("loads any other without a word, and answers nonsense" in line) == (head_dim == 16)
    assert line.startswith("| vLLM | no: it needs") == (head_dim == 16) and line.endswith(" |")
    assert run_command("hosts") == 0
    assert "answers nonsense" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("teacher", ONE_OF_EACH_FAMILY)
@torch.no_grad()
def test_losses_go_to_the_vocabulary_as_the_model_does(teacher):
    """Losses never call a model's own forward for logits; some models divide them."""
    ids = torch.randint(VOCABULARY, (2, 9))
    for model in (random_teacher(teacher), hybrid_of(teacher)[1]):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        torch.testing.assert_close(Head.of(model)(hidden), model(input_ids=ids, use_cache=False).logits)


def test_experts_that_a_token_does_not_run_through_cost_nothing():
    flops = []
    for experts in (4, 8):
        morphable = Morphable(transplant(random_teacher("qwen3_moe", num_experts=experts))[0])
        meter = Meter(morphable)
        meter.count(2, 16, meter.parts_of([["full"], ["full"]]))
        routers = 2 * experts * morphable.model.config.hidden_size
        flops.append(meter.cost.flops - 2 * routers * 2 * 16)
    assert flops[0] == flops[1] > 0


@pytest.mark.parametrize("teacher", ONE_OF_EACH_FAMILY)
@torch.no_grad()
def test_generation_with_the_cache_is_recomputation_without(teacher):
    _, hybrid = hybrid_of(teacher)
    ids = torch.randint(VOCABULARY, (2, 20))
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    generated = hybrid.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    row = ids
    for _ in range(5):
        row = torch.cat([row, logits(hybrid, row)[:, -1:].argmax(-1)], 1)
    assert generated.tolist() == row.tolist()
    padded, mask = torch.cat([torch.full((1, 3), 7), ids[:1]], 1), torch.ones(1, 23, dtype=torch.long)
    mask[:, :3] = 0
    assert close(logits(hybrid, padded, attention_mask=mask)[:, 3:], logits(hybrid, ids[:1]))
    assert hybrid.generate(padded, attention_mask=mask, **settings)[0, 3:].tolist() == row[0].tolist()


ELSEWHERE = """
import sys

sys.modules["flashmorph"] = None
import torch
from transformers import AutoModelForCausalLM

ids = torch.arange(40)[None]
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        torch.save([model(ids).logits, model.generate(ids, max_new_tokens=4, do_sample=False)], folder + "/there.pt")
try:
    import flashmorph
except ImportError:
    print("no flashmorph here")
"""


def test_hybrids_of_every_family_open_where_there_is_no_flashmorph(tmp_path):
    hybrids = {}
    for teacher in ONE_OF_EACH_FAMILY:
        _, hybrid = hybrid_of(teacher)
        folder = tmp_path / teacher.partition(":")[0]
        random_teacher(teacher).save_pretrained(folder / "teacher")
        save_model(hybrid, folder / "hybrid", folder / "teacher")
        hybrids[folder / "hybrid"] = hybrid
    command = [sys.executable, "-c", ELSEWHERE, *map(str, hybrids)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "no flashmorph here" in done.stdout
    ids = torch.arange(40)[None]
    for folder, hybrid in hybrids.items():
        there, generated = torch.load(folder / "there.pt")
        torch.testing.assert_close(there, logits(hybrid, ids))
        assert torch.equal(generated, hybrid.generate(ids, max_new_tokens=4, do_sample=False))
