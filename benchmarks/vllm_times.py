"""Runs in vLLM's own environment: how long checkpoints take there, in turns; for engines.py.

Reads one job as JSON from standard input and writes the figures as JSON to the file that it is given. All engines are
open in this one process at the same time. Each line on standard output stands for a finished measurement.
"""

import json
import sys
import time
from typing import Any


def opened(folder: str, job: dict[str, Any]) -> Any:
    """The checkpoint's engine for one sequence, without compilation, reading in batches of `job["batched"]` tokens."""
    from vllm import LLM

    return LLM(
        folder,
        dtype=job["dtype"],
        enforce_eager=True,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,  # The same prompts come again, and Mamba2 on a CPU fails with it.
        max_model_len=max(job["lengths"]) + job["decode_tokens"] + 1,
        max_num_batched_tokens=job["batched"],
        max_num_seqs=1,
    ).llm_engine


def scheduler_of(engine: Any) -> Any:
    """What schedules and holds the cache; it is in this process."""
    return engine.engine_core.engine_core.scheduler


def cache_of(engine: Any) -> dict[str, Any]:
    """The cache as vLLM has laid it out: groups of layers, tokens and bytes of a block, and the number of blocks."""
    config = scheduler_of(engine).kv_cache_config
    specs = [group.kv_cache_spec for group in config.kv_cache_groups]
    return {
        "groups": [[len(group.layer_names), type(group.kv_cache_spec).__name__] for group in config.kv_cache_groups],
        "block_tokens": max(spec.block_size for spec in specs if "Attention" in type(spec).__name__),
        # The tensors of all groups are views of the same bytes.
        "block_bytes": config.kv_cache_tensors[0].size // config.num_blocks,
        "blocks": config.num_blocks,
    }


def measure(engine: Any, length: int, num_decoded: int) -> dict[str, Any]:
    """Seconds to read `length` tokens and of each of `num_decoded` steps after it, by the clock and of this process.

    `blocks` of the cache are those of the sequence before its last step.
    """
    from vllm import SamplingParams

    pool = scheduler_of(engine).kv_cache_manager.block_pool
    free, written, blocks = pool.get_num_free_blocks(), 0, 0
    asked = SamplingParams(temperature=0, max_tokens=num_decoded + 1, ignore_eos=True, detokenize=False)
    engine.add_request(str(time.time_ns()), {"prompt_token_ids": [1 + at % 1000 for at in range(length)]}, asked)
    found: dict[str, Any] = {"prefill": 0.0, "prefill_cpu": 0.0, "decode": [], "decode_cpu": []}
    while engine.has_unfinished_requests():
        blocks = free - pool.get_num_free_blocks()
        start, start_cpu, reading = time.perf_counter(), time.process_time(), written == 0
        outputs = engine.step()
        seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
        written = len(outputs[0].outputs[0].token_ids) if outputs else written
        if reading:
            found["prefill"] += seconds
            found["prefill_cpu"] += cpu
        else:
            found["decode"].append(seconds)
            found["decode_cpu"].append(cpu)
    assert len(found["decode"]) == num_decoded, (len(found["decode"]), num_decoded)
    return {**found, "blocks": blocks}


def operators(engine: Any, length: int, num_decoded: int) -> list[list[Any]]:
    """The ten operators with most time of their own, as name, calls and seconds, and the sum of all."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as found:
        measure(engine, length, num_decoded)
    events = sorted(found.key_averages(), key=lambda event: -event.self_cpu_time_total)
    rows = [[event.key, event.count, event.self_cpu_time_total / 1e6] for event in events]
    return [*rows[:10], ["all", sum(row[1] for row in rows), sum(row[2] for row in rows)]]


def main() -> None:
    """Open all engines, warm them up, then every round of every length; then the profiles."""
    job = json.load(sys.stdin)
    engines = {name: opened(each["folder"], job) for name, each in job["models"].items()}
    for engine in engines.values():
        measure(engine, min(job["lengths"]), 2)
    found: dict[str, Any] = {"cache": {name: cache_of(engine) for name, engine in engines.items()}, "by_length": []}
    for length in job["lengths"]:
        asked = [name for name in engines if length <= job["models"][name].get("longest", length)]
        rounds: dict[str, list] = {name: [] for name in asked}
        for turn in range(job["repeats"]):
            for name in asked if turn % 2 == 0 else asked[::-1]:
                rounds[name].append(measure(engines[name], length, job["decode_tokens"]))
                print(f"{name} {length}", flush=True)
        found["by_length"].append({"length": length, "rounds": rounds})
    if length := job.get("profile"):
        found["profile"] = {name: operators(engine, length, 1) for name, engine in engines.items()}
    with open(sys.argv[1], "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main()
