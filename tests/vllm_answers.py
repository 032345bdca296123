"""Runs in vLLM's own environment: greedy tokens and log-probabilities of checkpoints, one after the other.

Reads jobs as JSON from standard input and writes the answers as JSON to the file that it is given.
"""

import gc
import json
import sys


def answer(job: dict) -> dict:
    """Tokens `[prompts][new]`, and log-probabilities of all tokens but the first of `texts`."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        job["folder"],
        dtype=job["dtype"],
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=512,
        max_num_seqs=4,
        **job["options"],
    )
    try:
        greedy = SamplingParams(temperature=0, max_tokens=job["new"], ignore_eos=True, detokenize=False)
        read = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
        written = [list(output.outputs[0].token_ids) for output in engine.generate(prompts, greedy, use_tqdm=False)]
        rows = []
        for ids in job["texts"]:
            (output,) = engine.generate([{"prompt_token_ids": ids}], read, use_tqdm=False)
            rows.append([each[token].logprob for token, each in zip(ids[1:], output.prompt_logprobs[1:], strict=True)])
        return {"tokens": written, "logprobs": rows}
    finally:
        engine.llm_engine.engine_core.shutdown()
        del engine
        gc.collect()


def main() -> None:
    """All jobs."""
    answers = []
    for job in json.load(sys.stdin):
        try:
            answers.append(answer(job))
        except Exception as error:
            answers.append({"error": f"{type(error).__name__}: {error}"})
    with open(sys.argv[1], "w") as file:
        json.dump(answers, file)


if __name__ == "__main__":
    main()
