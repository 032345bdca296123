"""An estimate in words: what it assumes, what does not fit, and the formula behind each figure."""

from collections.abc import Iterator

from flashmorph.estimate.estimate import MOST_GPUS, Estimate, Stage
from flashmorph.hosts import FEED_FORWARD
from flashmorph.hosts.vllm_cache import VllmCache, in_words
from flashmorph.plan import FULL
from flashmorph.units import amount


def notes(found: Estimate) -> Iterator[str]:
    """What the tables assume, and what to change where a stage does not fit."""
    gpu, model = found.gpu, found.model
    if vllm := found.in_vllm:
        yield in_words(vllm[1].groups, model.kept, model.layers - model.kept)
    if not gpu:
        yield "Hours and what fits: name a GPU, for example --gpu h200. Formulas: --explain."
        if any(stage.auto for stage in found.stages):
            yield "memory of a GPU: settings at `auto` count as one row at once; a named GPU has its own choice."
        return
    yield (
        f"Hours assume {found.utilisation:.0%} of the peak of {found.num_gpus} x {gpu.name} "
        f"({gpu.flops / 1e12:,.0f} TFLOP/s in bfloat16; --utilisation), and text that is read fast enough; "
        "milliseconds: weights and cache read once."
    )
    unknown = "; nor has select, of which only the search tells" if _is_open(found) else ""
    yield f"transplant runs in float32, evaluate generates: both have no hours here{unknown}. Every formula: --explain."
    yield _least(found)
    if found.num_gpus > 1:
        yield (
            "memory of a GPU: each holds all weights; sharded (shard=true, or auto where it must be): decoder layers "
            "and what trains are sharded over them, and build runs on the CPU."
        )
    if values := {key: value for stage in found.stages for key, value in stage.auto.items()}:
        choices = ", ".join(f"{key} {_value(value)}" for key, value in values.items())
        yield f"auto on this GPU, in four fifths of its memory: {choices}."
    large = [stage for stage in found.stages if stage.memory and stage.memory.bytes() > gpu.memory_bytes]
    fitting = [stage for stage in large if found.sharded and _fits_sharded(found, stage)]
    if fitting:
        names = ", ".join(stage.name for stage in fitting)
        yield f"Weights are sharded over the GPUs: {names} would not fit otherwise."
    for stage in large:
        if stage not in fitting:
            yield _does_not_fit(found, stage)


def _is_open(found: Estimate) -> bool:
    return any(stage.tokens is None for stage in found.stages)


def _least(found: Estimate) -> str:
    """The fewest GPUs that are enough."""
    assert found.gpu
    if found.least_gpus is None:
        return f"No number of {found.gpu.name} up to {MOST_GPUS} fits a row of every stage that trains or searches."
    shared = ", which share the weights" if found.least_gpus > 1 else ""
    return f"Smallest --gpus that fits a row of every stage that trains or searches: {found.least_gpus}{shared}."


def _value(value: int | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:,}"


def _fits_sharded(found: Estimate, stage: Stage) -> bool:
    assert stage.memory and found.gpu
    return stage.memory.bytes(found.num_gpus) <= found.gpu.memory_bytes


def _does_not_fit(found: Estimate, stage: Stage) -> str:
    assert stage.memory and found.gpu
    memory, gpu = stage.memory, found.gpu
    whole, shared = memory.tokens_within(gpu.memory_bytes), memory.tokens_within(gpu.memory_bytes, found.num_gpus)
    if whole:
        return f"! {stage.name} does not fit; it does with --set {memory.setting}={whole}"
    if _fits_sharded(found, stage) and found.num_gpus > 1:
        return f"! {stage.name} fits only with --set shard=true"
    if shared:
        return f"! {stage.name} fits only with --set shard=true --set {memory.setting}={shared}"
    least = f", not even one row of {memory.length:,} tokens" if memory.tokens else ""
    if memory.keeps_layers:
        return f"! {stage.name} does not fit{least}: try --set {stage.name}.activation_checkpointing=true"
    return f"! {stage.name} does not fit{least}: more memory, or more GPUs that share the weights"


def explain(found: Estimate) -> Iterator[str]:
    """Every figure with its formula, a line each."""
    model, sizes = found.model, found.sizes
    config, layers, num_full, switched = model.config, model.layers, model.num_full, model.switched
    yield "\nParameters, counted on models without memory:"
    yield f"  teacher {sizes.teacher:,}; host, every layer full {sizes.host:,}"
    yield (
        f"  hybrid = host + {switched} layers · ({switched} mixer - attention) = {sizes.host:,} + "
        f"{layers - num_full:g} · ({sizes.parts[switched].parameters:,} - {sizes.parts[FULL].parameters:,}) = "
        f"{found.hybrid_parameters:,}"
    )
    yield "\nCache of one sequence, bytes:"
    for context, (teacher, hybrid) in found.cache.items():
        full, other = (model.host.mixers[option].cache_bytes(config, context) for option in (FULL, switched))
        yield (
            f"  at {context:,}: teacher {layers} · {full:,} = {teacher:,}; "
            f"hybrid {num_full:g} · {full:,} + {layers - num_full:g} · {other:,} = {hybrid:,}"
        )
    if vllm := found.in_vllm:
        yield "\nThe same in vLLM, groups · layers of a group · pages · bytes of a page, as its 0.32 does on a GPU:"
        for context in found.cache:
            yield f"  at {context:,}: {_vllm_formula(vllm[1], context)}"
    length = max(stage.length for stage in found.stages if stage.memory)
    yield f"\nFLOPs of one layer for each token, forward, at a context of {length:,} (a multiply-add counts as two):"
    for part in (FULL, switched, FEED_FORWARD):
        for product in model.part(part, length):
            kernels = f"; kernels {product.flops * product.causal:,.0f}" if product.causal != 1 else ""
            yield f"  {part:<12} {product.name:<20} {product.formula} = {product.flops:,.0f}{kernels}"
    yield f"  {'head':<12} {'logits':<20} 2 · hidden · vocabulary = {model.head:,.0f}"
    yield "  Counted as on eager attention, with all scores (of a window, those inside); hours take what kernels do."
    yield "  A row counts as one document. Linear mixers work in whole chunks."
    yield "\nFLOPs of each stage = tokens · sum (what kernels do in brackets):"
    for stage in found.stages:
        if stage.work and stage.work.tokens:
            yield f"  {stage.name}: {stage.work.tokens:,} · ("
            for each in stage.work.passes:
                yield f"      {each.name}: {amount(each.flops)} ({amount(each.causal)})"
            yield f"    ) = {amount(stage.work.flops)} ({amount(stage.work.causal)})"
        elif stage.tokens is None:
            yield f"  {stage.name}: known only as the search goes"
    if found.gpu:
        yield (
            f"\nHours = FLOPs that kernels do / ({found.num_gpus} GPUs · {found.gpu.flops / 1e12:,.0f} TFLOP/s · "
            f"{found.utilisation}) / 3600. The share of the peak is an assumption."
        )
        yield (
            "Least time of a generated token = (weights in the teacher's dtype, of experts the chosen ones, + cache) / "
            f"{amount(found.gpu.bandwidth)}B/s."
        )
    yield "\nMemory of a GPU, bytes (tokens at once: an estimate; `sharded` divides decoder layers and what trains):"
    for stage in found.stages:
        if stage.memory:
            parts = [f"{share.name} {share.formula} = {share.bytes:,.0f}" for share in stage.memory.shares]
            if stage.memory.tokens:
                parts.append(f"{stage.memory.tokens:,} tokens at once · {stage.memory.per_token:,.0f} kept for each")
            yield f"  {stage.name}: " + "; ".join(parts) + f"; in all {stage.memory.bytes():,.0f}"


def _vllm_formula(cache: VllmCache, context: int) -> str:
    groups, pages = cache.groups, cache.pages
    of_switched = pages.switched(context)
    return (
        f"({groups.full} · {-(-context // pages.block_tokens)} + {groups.switched} · {of_switched}) · {groups.size} · "
        f"{pages.page_bytes:,} = {cache.sequence_bytes(context):,} (blocks of {pages.block_tokens} tokens)"
    )
