"""What a hybrid's speed and cache grow like: a pair of random weights of any shape, timed in turns.

    python benchmarks/speed.py --width 512 --layers 8 --full 2 --lengths 512,1024,2048,4096,8192,16384

Speed does not depend on what the weights know, so nothing needs to be trained. The full layers stand at regular
intervals. Leave the machine alone meanwhile. Writes `benchmarks/results/speed.json`.
"""

import argparse
import shlex
import sys
from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedModel, Qwen3Config

from flashmorph.bench import BenchSettings, bench
from flashmorph.cli.bench import show
from flashmorph.cli.options import numbers, quiet
from flashmorph.cli.screen import RichScreen
from flashmorph.devices import pick_device
from flashmorph.files import write_json
from flashmorph.hosts import host_for
from flashmorph.mixers import LINEAR
from flashmorph.plan import FULL


def add_shape(parser: argparse.ArgumentParser) -> None:
    """The options that make a shape."""
    for name, default in (("width", 512), ("layers", 8), ("full", 2), ("head-dim", 64), ("vocabulary", 4096)):
        parser.add_argument(f"--{name}", type=int, default=default)


def shape_of(arguments: argparse.Namespace) -> dict[str, int]:
    """The shape that the options make, for the record."""
    return {name: getattr(arguments, name) for name in ("width", "layers", "full", "head_dim", "vocabulary")}


def teacher_config(arguments: argparse.Namespace, dtype: torch.dtype) -> Qwen3Config:
    """A teacher of this shape, two query heads to each head of keys and values."""
    return Qwen3Config(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.width,
        intermediate_size=3 * arguments.width,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.width // arguments.head_dim,
        num_key_value_heads=max(1, arguments.width // arguments.head_dim // 2),
        head_dim=arguments.head_dim,
        max_position_embeddings=2**20,
        tie_word_embeddings=True,
        dtype=dtype,
    )


def hybrid_options(arguments: argparse.Namespace) -> list[str]:
    """`full` full layers at regular intervals."""
    every = arguments.layers // arguments.full
    return [FULL if (layer + 1) % every == 0 else LINEAR for layer in range(arguments.layers)]


def random_pair(arguments: argparse.Namespace, device: torch.device) -> dict[str, PreTrainedModel]:
    """The host with all layers full, and the same shape with `full` of them; with `lean` also with narrow layers."""
    dtype = getattr(torch, arguments.dtype)
    teacher = teacher_config(arguments, dtype)
    host = host_for(teacher)
    models = {}
    some = hybrid_options(arguments)
    lean = {"key_heads": teacher.num_key_value_heads}
    kinds: list[tuple[str, list[str], dict[str, int]]] = [("full", [FULL] * arguments.layers, {}), ("hybrid", some, {})]
    for name, options, settings in [*kinds, *([("lean", some, lean)] if getattr(arguments, "lean", False) else [])]:
        torch.manual_seed(0)
        config = host.with_plan(host.config(teacher, **settings), options)
        models[name] = host.model_class(config).to(device, dtype).eval()
    return models


def main() -> None:
    """Make the pair, time it, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shape(parser)
    parser.add_argument("--lean", action="store_true", help="also a hybrid with a head for each key-value head only")
    parser.add_argument("--lengths", default="512,1024,2048,4096,8192,16384")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--decode-tokens", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/speed.json"))
    arguments = parser.parse_args()
    quiet()
    settings = BenchSettings(
        lengths=tuple(numbers("--lengths", arguments.lengths)),
        repeats=arguments.repeats,
        decode_tokens=arguments.decode_tokens,
    )
    models = random_pair(arguments, pick_device(arguments.device))
    with RichScreen(Console(stderr=True)).stage("bench", "random pair") as report:
        figures = bench(models, settings, report)
    command = f"python benchmarks/speed.py {shlex.join(sys.argv[1:])}".strip()
    parameters = {name: sum(weight.numel() for weight in model.parameters()) for name, model in models.items()}
    about = {"command": command, "shape": shape_of(arguments), "parameters": parameters}
    write_json(arguments.output, {**about, **figures})
    show(figures)


if __name__ == "__main__":
    main()
