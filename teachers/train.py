"""Train an embedded teacher from its settings file and write it as a Hugging Face folder.

    python teachers/train.py teachers/tiny.yaml --output tiny-first
    python teachers/train.py teachers/tiny_second.yaml --start tiny-first --output src/flashmorph/assets/tiny
    python teachers/train.py teachers/llama.yaml --start src/flashmorph/assets/tiny --output teachers/llama
    python teachers/train.py teachers/twin_chains.yaml --start src/flashmorph/assets/tiny --output teachers/twin_chains

Minutes on two cores without a GPU. The recipe: matrices by Muon, the rest by AdamW; lengths grow as answers become
right; until `windows_until` of the steps only the `retrieval_layers` attend fully, the others to a short window, which
makes retrieval emerge early and puts it into known layers (a *planted* teacher). With `twins` only one layer of each of
those groups, drawn anew in each step, so that each can do its group's job alone; `copied_attention` starts a layer with
the attention of another (`{3: 2}`: layer 3 with that of layer 2). Where `retrieval_layers` is empty, any layer is local
in `local_share` of the steps, so that layers learn to stand in for each other (a *redundant* teacher); with a share of
0 it is a *natural* one. With `shape: llama` the start's norms of queries and keys, which Llama lacks, are replaced by
what they do on average, and the training takes care of the rest.
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.optimization import get_wsd_schedule

from bpe import train_tokenizer
from curriculum import Curriculum, window_mask
from flashmorph.data.corpus import Corpus

PARTS = {1: "answer", 2: "hop", 3: "link", 4: "copy"}


def main() -> None:
    """Read the settings, train, save model, tokenizer, log and settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="go on from this teacher's weights and tokenizer")
    arguments = parser.parse_args()
    settings = yaml.safe_load(arguments.settings.read_text())
    set_seed(settings["seed"])
    if arguments.start:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.start)
    else:
        tokenizer = train_tokenizer(Corpus().documents("train", 0), settings["lengths"][-1])
    is_llama = settings.get("shape") == "llama"
    config = (LlamaConfig if is_llama else Qwen3Config)(
        vocab_size=len(tokenizer),
        max_position_embeddings=settings["lengths"][-1],
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        tie_word_embeddings=True,
        attn_implementation="eager",
        **settings["model"],
    )
    model = (LlamaForCausalLM if is_llama else Qwen3ForCausalLM)(config)
    curriculum = Curriculum(tokenizer, settings["seed"], settings["key_words"])
    if arguments.start:
        start = Qwen3ForCausalLM.from_pretrained(arguments.start, dtype=torch.float32)
        if is_llama:
            fold_norms(start, curriculum.batch(settings["mixtures"][0], 16, settings["lengths"][0])["ids"])
        # A Llama has no norms of queries and keys; all else has the same names.
        missing = model.load_state_dict(start.state_dict(), strict=not is_llama).missing_keys
        assert not missing
    for layer, other in settings.get("copied_attention", {}).items():
        model.model.layers[layer].self_attn.load_state_dict(model.model.layers[other].self_attn.state_dict())
    print(f"{model.num_parameters():,} parameters", flush=True)
    log = train(model, curriculum, settings)
    if not is_llama:
        model.config.layer_types = ["full_attention"] * config.num_hidden_layers
    model.to(torch.bfloat16).save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    (arguments.output / "training_log.json").write_text(json.dumps({"settings": settings, "log": log}, indent=1) + "\n")


@torch.no_grad()
def fold_norms(model: Qwen3ForCausalLM, ids: torch.Tensor) -> None:
    """Scale the rows of query and key projections by what their norms do on average over `ids` `[rows, length]`: the
    norm's weights, divided by the mean size of each head's vector."""
    sizes: dict[torch.nn.Module, torch.Tensor] = {}

    def keep(projection: torch.nn.Module, _: object, rows: torch.Tensor) -> None:
        heads = rows.unflatten(-1, (-1, model.config.head_dim))
        sizes[projection] = heads.square().mean(-1).sqrt().flatten(0, 1).mean(0)

    attentions = [layer.self_attn for layer in model.model.layers]
    pairs = [(a.q_proj, a.q_norm) for a in attentions] + [(a.k_proj, a.k_norm) for a in attentions]
    hooks = [projection.register_forward_hook(keep) for projection, _ in pairs]
    model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    for projection, norm in pairs:
        projection.weight *= (norm.weight / sizes[projection][:, None]).flatten()[:, None]


def train(model: PreTrainedModel, curriculum: Curriculum, settings: dict) -> list[dict]:
    """The loop: returns the log, one entry every 20 steps."""
    accelerator = Accelerator(mixed_precision="bf16" if settings["bf16"] else "no")
    optimizers = make_optimizers(model, settings)
    steps, warmup = settings["steps"], 50
    decay = int(settings["decay_share"] * steps)
    schedules = [
        get_wsd_schedule(optimizer, warmup, decay, num_stable_steps=steps - warmup - decay, decay_type="linear")
        for optimizer in optimizers
    ]
    model, *optimizers = accelerator.prepare(model, *optimizers)
    rng, stage, right, log = random.Random(settings["seed"]), 0, {}, []
    start = time.perf_counter()
    for step in range(steps):
        length = settings["lengths"][stage]
        batch = curriculum.batch(settings["mixtures"][stage], settings["batch_tokens"] // length, length)
        masks, types = attention_pattern(step, stage, length, settings, rng, model.config.num_hidden_layers)
        pattern = masks["full_attention"]
        if not isinstance(model.config, LlamaConfig):
            model.config.layer_types, pattern = types, masks
        with accelerator.autocast():
            logits = model(input_ids=batch["ids"], attention_mask=pattern, use_cache=False).logits
        losses = F.cross_entropy(logits.float().flatten(0, 1), batch["labels"].flatten(), reduction="none")
        weights = batch["weights"].flatten()
        accelerator.backward((losses * weights).sum() / weights.sum())
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        track(right, logits, batch)
        if stage + 1 < len(settings["lengths"]) and (
            learned(right, stage, settings["mixtures"][stage]) or step > settings["leave_by"][stage] * steps
        ):
            stage += 1
            right.clear()
        if step % 20 == 0 or step == steps - 1:
            text = losses[weights == 1].mean().item()
            entry = {
                "step": step,
                "length": length,
                "seconds": round(time.perf_counter() - start),
                "text": text,
                **right,
            }
            log.append({key: round(value, 4) for key, value in entry.items()})
            print(json.dumps(log[-1]), flush=True)
    return log


def learned(right: dict[str, float], stage: int, mixture: dict[str, float]) -> bool:
    """Whether the answers of a stage are right often enough to go on; two hops are asked for from the second on."""
    enough = right.get("answer", 0) > 0.9
    if mixture["hops"]:
        enough = enough and right.get("link", 0) > 0.87 and (stage == 0 or right.get("hop", 0) > 0.8)
    return enough


def make_optimizers(model: PreTrainedModel, settings: dict) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings and norms."""
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    chosen = set(map(id, matrices))
    rest = [weight for weight in model.parameters() if id(weight) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=settings["muon_lr"], momentum=0.95, weight_decay=0.1),
        torch.optim.AdamW(rest, lr=settings["adamw_lr"], betas=(0.9, 0.95), weight_decay=0.0),
    ]


def attention_pattern(
    step: int, stage: int, length: int, settings: dict, rng: random.Random, num_layers: int
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Masks by layer type, and the type of every layer in this step."""
    full, every = list(settings["retrieval_layers"]), list(range(num_layers))
    if step > settings["windows_until"] * settings["steps"]:
        full = every
    elif not full:
        full = [layer for layer in every if rng.random() >= settings["local_share"]]
    elif settings.get("twins"):
        full = [rng.choice(group) for group in settings["twins"]]
    elif stage + 1 < len(settings["lengths"]) and rng.random() < settings["one_layer_share"]:
        full.remove(rng.choice(full))
    types = ["full_attention" if layer in full else "sliding_attention" for layer in range(num_layers)]
    masks = {"full_attention": None, "sliding_attention": rng.randint(16, 31)}
    dtype = torch.bfloat16 if settings["bf16"] else torch.float32
    biases = {
        name: torch.zeros(1, 1, length, length, dtype=dtype).masked_fill(~window_mask(length, window), float("-inf"))
        for name, window in masks.items()
    }
    return biases, types


@torch.no_grad()
def track(right: dict[str, float], logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> None:
    """Running share of right tokens for each kind of answer."""
    hits = logits.argmax(-1) == batch["labels"]
    for part, name in PARTS.items():
        chosen = (batch["part"] == part) & (batch["weights"] > 0)
        if chosen.any():
            share = hits[chosen].float().mean().item()
            right[name] = 0.9 * right.get(name, 0.0) + 0.1 * share


if __name__ == "__main__":
    main()
