"""What a GPU does with the shape of a Qwen3-1.7B: training steps, the search, reading and writing long contexts.

    python benchmarks/gpu.py --gpu h200

Random weights: speed does not depend on what they know. For align, gates and distill at the settings of the recipe
`default`: tokens a second, share of the GPU's peak, memory at its peak and what `flashmorph estimate` says of it; how
many hours the gates' descent takes at those settings (`--search`: the whole search is run); prefill and decode of
teacher and hybrid; and which kernels ran, by the profiler. Writes
`benchmarks/results/gpu.json` after each part.
Without CUDA the same code runs at toy size on the CPU, says that it measured nothing, and writes nothing.
"""

import argparse
import gc
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen3Config

from flashmorph.bench import BenchSettings, bench, measure_rates
from flashmorph.bench.limit import timed
from flashmorph.bench.memory import peak_bytes
from flashmorph.cli.bench import show
from flashmorph.cli.environment import describe
from flashmorph.cli.options import numbers, quiet
from flashmorph.convert.load import load_tokenizer
from flashmorph.convert.teacher import open_teacher
from flashmorph.devices import pick_device, use_bf16
from flashmorph.estimate import Estimate, Gpu, estimate, find_gpu
from flashmorph.files import write_json
from flashmorph.hosts import configure, layer_space
from flashmorph.model.frozen import narrow
from flashmorph.model.morphable import Morphable
from flashmorph.plan import Budget
from flashmorph.recipe.recipe import Recipe, load_recipe, with_settings
from flashmorph.selection import BASELINE
from flashmorph.selection.objective import MorphableObjective
from flashmorph.selection.search import own_settings, plan_without_search, select
from flashmorph.selection.searchdata import SearchData, step_shape
from flashmorph.stages.align import AlignmentLoss
from flashmorph.stages.distill import DistillationLoss
from flashmorph.tasks import STYLES, Haystack, Layout

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from kernel_names import kernels_of

SHAPE = {
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
TOY_SHAPE = {
    "vocab_size": 1536,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
TEACHERS = {"qwen3": Qwen3Config, "llama": LlamaConfig}
PACKAGES = {"qwen3": "fla", "llama": "mamba_ssm"}
"""Whose kernels the host's linear mixer runs."""
TOY_RECIPE = {
    **{f"{stage}.{name}": value for stage in ("align", "distill", "extend") for name, value in
       {"tokens": 128, "length": 32, "batch_tokens": 64, "micro_batch_tokens": 64}.items()},
    "select.search": {"length": [64, 128], "batch_tokens": 128, "micro_batch_tokens": 128, "questions": 2},
    "select.settings": {"steps": 3, "swaps": 1},
    "evaluate.length": 128,
    "style": "lines",
    "tasks": {"one_key": {"task": "many_keys", "num_keys": 1}},
}  # fmt: skip


class Run:
    """The models of one shape on one device, what the recipe asks of them, and what was found so far."""

    def __init__(self, config: PreTrainedConfig, recipe: Recipe, device: torch.device, gpu: Gpu | None, steps: int):
        self.config = config
        self.device, self.gpu, self.steps = device, gpu, steps
        self.bf16 = use_bf16(device)
        self.host, self.own = configure(config, recipe.host)
        self.budget = Budget("layers", config.num_hidden_layers // 4)
        space = layer_space(self.host, self.own, self.budget)
        self.plan = plan_without_search(BASELINE, space, self.budget)
        self.recipe = self.fitting(recipe)
        self.found: dict[str, Any] = {}

    def fitting(self, recipe: Recipe) -> Recipe:
        """With fewer tokens at once where `flashmorph estimate` says that a stage does not fit into nine tenths of this
        GPU."""
        if self.device.type != "cuda":
            return recipe
        room = 0.9 * torch.cuda.get_device_properties(self.device).total_memory
        needs = [stage.memory for stage in self.plan_says(recipe).stages if stage.memory and stage.memory.tokens]
        fitting = {memory.setting: memory.tokens_within(room) for memory in needs if memory.bytes() > room}
        return with_settings(recipe, {setting: tokens for setting, tokens in fitting.items() if tokens})

    def part(self, name: str, work: Callable[[], dict[str, Any]]) -> None:
        """Run one part; where memory is too small for it, that is what was found."""
        start = time.perf_counter()
        try:
            self.found[name] = work()
        except torch.OutOfMemoryError as error:
            self.found[name] = {"out_of_memory": str(error)}
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def model(self, config: PreTrainedConfig) -> PreTrainedModel:
        """A host of this configuration with random weights, in float32."""
        torch.manual_seed(0)
        with self.device:
            return self.host.model_class(cast(Any, config)).float()

    def morphable(self) -> Morphable:
        """The host with untrained branches; frozen weights have the dtype that a run keeps them in."""
        return Morphable(narrow(self.model(self.own), self.bf16))

    def ids(self, tokens: int, length: int) -> torch.Tensor:
        """Random rows of `length`."""
        return torch.randint(self.config.vocab_size, (max(1, tokens // length), length), device=self.device)

    def plan_says(self, recipe: Recipe) -> Estimate:
        """What `flashmorph estimate` says of a recipe."""
        budget = {"budget": str(self.budget)}
        return estimate("random", self.config, recipe.model_copy(update=budget), self.gpu)

    def train(self, name: str, loss: nn.Module) -> dict[str, Any]:
        """Steps of one stage: forward, backward and AdamW on rows of the recipe, in parts as it says."""
        settings = getattr(self.recipe, name)
        weights = [weight for weight in loss.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=1e-5, fused=self.device.type == "cuda")
        part = settings.division(1)

        def step() -> None:
            for _ in range(part.accumulation):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                    value = loss(self.ids(part.rows * settings.length, settings.length))["loss"]
                (value / part.accumulation).backward()
            optimizer.step()
            optimizer.zero_grad()

        steps = [(step, settings.batch_rows * settings.length)] * self.steps
        return self.measure(name, steps, self.plan_says(self.recipe))

    def measure(self, name: str, steps: list[tuple[Callable[[], object], int]], expected: Estimate) -> dict[str, Any]:
        """Time steps, each given with its tokens, after a round that compiles kernels and shows the peak of memory.

        The share of the peak (MFU) is of the operations that `flashmorph estimate` counts for kernels, without those
        that are done a second time to save memory.
        """
        fixed = torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else None
        different = {id(work): work for work, _ in steps}.values()
        above = peak_bytes(lambda: [work() for work in different], self.device)
        seconds = [timed(work, self.device) for work, _ in steps]
        tokens = sum(number for _, number in steps)
        stage = next(stage for stage in expected.stages if stage.name == name)
        assert stage.work and stage.memory
        rate = stage.work.once / stage.work.tokens * tokens / sum(seconds)
        return {
            "tokens": [number for _, number in steps],
            "seconds": seconds,
            "tokens_per_second": tokens / sum(seconds),
            "flops_per_second": rate,
            "share_of_peak": rate / self.gpu.flops if self.gpu else None,
            "peak_bytes": None if fixed is None or above is None else fixed + above,
            "peak_bytes_planned": stage.memory.bytes(),
        }

    def align(self) -> dict[str, Any]:
        """Branches trained beside their attention; and the kernels that this runs."""
        morphable = self.morphable()
        for weights in morphable.branch_parameters():
            for weight in weights:
                weight.requires_grad_(True)
        loss = AlignmentLoss(morphable)
        found = self.train("align", loss)
        ids = self.ids(self.recipe.align.length, self.recipe.align.length)

        def once() -> None:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                loss(ids)["loss"].backward()

        return {**found, "kernels": kernels_of(once, self.device, PACKAGES[self.config.model_type])}

    def gates(self, whole_search: bool) -> dict[str, Any]:
        """Some steps of the default search on retrieval questions, and the hours that all of them would take."""
        morphable, chosen = self.morphable(), self.recipe.select
        tokenizer = load_tokenizer(open_teacher("tiny").folder)
        assert tokenizer
        style = STYLES[self.recipe.style]
        layouts = {split: Layout(tokenizer, style, Haystack.repeated()) for split in ("train", "validation")}
        data = SearchData(layouts, style, list(self.recipe.tasks.values()), chosen.search)
        gates = torch.tensor(morphable.space(self.budget).one_hot(self.plan), dtype=torch.float32)
        with tempfile.TemporaryDirectory() as folder:
            objective = MorphableObjective(morphable, data, Path(folder), self.bf16)
            # The same share of long rows as in all steps: every so many of them.
            number = own_settings(chosen.strategy, chosen.settings)["steps"]
            shapes = [step_shape(chosen.search, self.recipe.seed, step) for step in range(number)]
            some = sorted(range(number), key=shapes.__getitem__)[:: max(1, number // self.steps)]
            steps = [
                (lambda step=step: objective.gradient(gates, step, "answers"), shapes[step][0] * shapes[step][1])
                for step in some
            ]
            found = self.measure("select", steps, self.plan_says(self.recipe))
            tokens = sum(length * rows for length, rows in shapes)
            found["hours_of_descent"] = tokens / found["tokens_per_second"] / 3600
            if whole_search:
                cost = select(morphable, self.budget, chosen.strategy, objective, **chosen.settings).cost
                found["whole_search"] = {**asdict(cost), "hours": cost.seconds / 3600}
        return found

    def distill(self) -> dict[str, Any]:
        """All weights of the hybrid trained towards the teacher."""
        hybrid = self.host.with_plan(self.own, list(self.plan.assignments.values()))
        student = self.model(hybrid).train()
        teacher = narrow(self.model(self.own), self.bf16).requires_grad_(False)
        return self.train("distill", DistillationLoss(student, teacher))

    def contexts(self, lengths: list[int], repeats: int) -> dict[str, Any]:
        """Prefill and decode of the teacher's own class and of the hybrid, in bfloat16, in turns."""
        hybrid = self.host.with_plan(self.own, list(self.plan.assignments.values()))
        with self.device:
            models: dict[str, Any] = {
                "teacher": AutoModelForCausalLM.from_config(self.config),
                "hybrid": self.host.model_class(cast(Any, hybrid)),
            }
        for name, model in models.items():
            models[name] = model.to(torch.bfloat16).eval()
        left_out = []
        while True:
            try:
                figures = bench(models, BenchSettings(lengths=tuple(lengths), repeats=repeats))
                return {**figures, "out_of_memory": left_out}
            except torch.OutOfMemoryError:
                left_out.append(lengths.pop())
                if not lengths:
                    raise


PARTS = ("align", "gates", "distill", "contexts")


def main() -> None:
    """Measure part by part, each written as it is done; or run at toy size and say so."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", help="its name in `flashmorph estimate`, for the share of its peak: h100, h200, ...")
    parser.add_argument("--teacher", choices=TEACHERS, default="qwen3", help="llama: its host's mixer is Mamba2")
    parser.add_argument("--window", type=int, help="switch layers to windows of so many tokens")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="what to measure; default: all that there is")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of each stage, after one that is not")
    parser.add_argument("--lengths", default="8192,32768,65536,131072,262144")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of prefill and decode")
    parser.add_argument("--search", action="store_true", help="run the whole search, not only some of its steps")
    parser.add_argument("--toy", action="store_true", help="toy size; measures nothing")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/gpu.json"))
    arguments = parser.parse_args()
    quiet()
    on_gpu = torch.cuda.is_available()
    toy = arguments.toy or not on_gpu
    device = pick_device("auto" if on_gpu else "cpu")
    window = {"host.window": arguments.window} if arguments.window else {}
    recipe = load_recipe("default", {**(TOY_RECIPE if toy else {}), **window})
    gpu = find_gpu(arguments.gpu) if arguments.gpu else None
    steps, lengths = (2, [64, 128]) if toy else (arguments.steps, numbers("--lengths", arguments.lengths))
    shape = TOY_SHAPE if toy else SHAPE
    config = TEACHERS[arguments.teacher](
        **shape, max_position_embeddings=2**19, tie_word_embeddings=True, dtype=torch.bfloat16
    )
    run = Run(config, recipe, device, gpu, steps)
    works = {
        "align": run.align,
        "gates": lambda: run.gates(arguments.search or toy),
        "distill": run.distill,
        "contexts": lambda: run.contexts(lengths, 1 if toy else arguments.repeats),
    }
    figures = {} if toy else head(run)
    has_branches = any(mixer.trainable for mixer in run.host.mixers.values())
    for name in arguments.parts or PARTS[not has_branches :]:
        run.part(name, works[name])
        if not toy:
            write_json(arguments.output, {**figures, **run.found})
    if toy:
        print(f"{', '.join(run.found)} ran at toy size on {describe()['device']}. This measured nothing.")
        return
    show_steps(run.found)
    if "models" in run.found.get("contexts", {}):
        show(run.found["contexts"])


def head(run: Run) -> dict[str, Any]:
    """What the figures are of: command, machine, shape and settings."""
    return {
        "command": f"python benchmarks/gpu.py {shlex.join(sys.argv[1:])}".strip(),
        "machine": {**describe(), **measure_rates(run.device, torch.bfloat16).to_dict()},
        "shape": SHAPE,
        "settings": run.recipe.model_dump(mode="json", include={"host", "align", "select", "distill"}),
    }


def show_steps(found: dict[str, Any]) -> None:
    """A line for each stage that trains or searches, the hours of the gates, and whose kernels ran."""
    table = Table(title="steps at the settings of the recipe `default`", title_justify="left")
    for column in ("stage", "tokens a second", "of the peak", "memory, GiB", "planned"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for name in ("align", "gates", "distill"):
        if name not in found:
            continue
        each = found[name]
        if "seconds" not in each:
            table.add_row(name, "out of memory")
            continue
        share = "" if each["share_of_peak"] is None else f"{each['share_of_peak']:.0%}"
        sizes = (f"{each[key] / 2**30:,.1f}" for key in ("peak_bytes", "peak_bytes_planned"))
        table.add_row(name, f"{each['tokens_per_second']:,.0f}", share, *sizes)
    Console().print(table)
    gates = found.get("gates", {})
    if hours := gates.get("hours_of_descent"):
        print(f"gates: {hours:.2f} hours for all steps of the descent, without the neighbours tried at its end")
    if whole := gates.get("whole_search"):
        print(f"gates: {whole['hours']:.2f} hours for the whole search")
    for package in set(PACKAGES.values()) & found.get("align", {}).get("kernels", {}).keys():
        print(f"kernels of {package}: {', '.join(found['align']['kernels'][package]) or 'none ran'}")


if __name__ == "__main__":
    main()
