"""The model card of a finished run."""

from pathlib import Path
from typing import cast

from transformers import PreTrainedConfig

from flashmorph.bench import Timing, timing_in_words
from flashmorph.convert.gguf import origin_of
from flashmorph.convert.hub import at_revision
from flashmorph.evaluation import points, text_in_words, times
from flashmorph.hosts import configure, misreads_tokenizer
from flashmorph.hosts.serving import Engine
from flashmorph.mixers import LAYER_TYPES
from flashmorph.pipeline.metadata import front_matter, in_words
from flashmorph.plan import FULL
from flashmorph.report.markup import sentence
from flashmorph.run.run import Results, Run
from flashmorph.selection import BASELINE
from flashmorph.surface.quoting import code, code_block, encodable, markdown, no_option, python_string, shell_command
from flashmorph.units import byte_size, longest_context
from flashmorph.versions import own_version

_NAMES = {
    "teacher": "teacher",
    "hybrid": "**this hybrid**",
    "hybrid_before_extend": "this hybrid, before extension",
    "hybrid_undistilled": "this hybrid, before distillation",
    BASELINE: f"{BASELINE} layout, same budget and training",
    f"{BASELINE}_undistilled": f"{BASELINE} layout, before distillation",
}
_KERNELS = """
On a machine without a GPU, leave flash-linear-attention and mamba-ssm uninstalled (or Triton): transformers picks its
kernels where they can be imported, and they do not run there.
"""

_TOKENIZER = """
`AutoTokenizer` reads the tokenizer of this model type as Qwen3.5's, which splits words at combining marks otherwise
than the teacher's. `PreTrainedTokenizerFast.from_pretrained` reads it as it is; give engines the teacher's.
"""

_OWN_TYPE = """A checkpoint of flashmorph's own model type: stock classes hold whole layers only. Its code lies
beside it and needs nothing but transformers. Where flashmorph is installed, `import flashmorph.own` takes the place of
`trust_remote_code`. transformers alone serves it; vLLM would need a plugin that registers the class and keeps the
states of its mixers beside the paged keys and values:"""

_STOCK = "Nothing of flashmorph's is needed to use it:"


def model_card(run: Run, results: Results) -> str:
    """README.md of the output: the model, its scores, engines that serve it, and how it was made."""
    host, config = configure(run.teacher.config, run.recipe.host)
    plan = results.plan
    used = [option for option in host.mixers if option != FULL and option in plan.assignments.values()]
    tags = [LAYER_TYPES.get(option, option).replace("_", "-") for option in used]
    mixers = " or ".join(host.mixers[option].name for option in used)
    config = host.with_plan(config, list(plan.assignments.values()))
    engines = "\n".join(served_by(engine, config) for engine in host.engines)
    kept, number = len(plan.full_groups), len(plan.assignments)
    selected = any(stage.name == "select" for stage in results.stages)
    given = [] if selected else ["--plan", "plan.json"]
    teacher = run.teacher.name
    pinned = no_option(at_revision(teacher, run.teacher.revision))
    words = ["flashmorph", "morph", pinned, "--recipe", "recipe.yaml", *given, "--output", "FOLDER"]
    revision = f" at revision {code(run.teacher.revision)}" if run.teacher.revision else ""
    origin = f" ({stored})" if (stored := origin_of(run.teacher.folder)) else ""
    context = longest_context(score.cache_bytes for score in results.scores.values())
    rows = "\n".join(_row(name, score, context) for name, score in results.scores.items())
    tasks = ", ".join(map(code, run.recipe.tasks))
    text = text_in_words(results.scores["hybrid"].to_dict())
    groups, named = ("key-value heads", "layer.head") if plan.has_heads else ("layers", "layers")
    chat = bool(run.tokenizer.chat_template)
    snippet = usage(run.folder.path.resolve(), host.model_type, bool(host.travelling), chat)
    return encodable(f"""---
{front_matter(run, tags)}---

# Hybrid of {markdown(teacher)}

Made from {code(teacher)}{revision}{origin} by flashmorph {own_version()}. {kept} of {number} {groups} keep full
attention, chosen by {code(plan.strategy)} for the budget {plan.budget}: {named} {plan.in_short()}.{_time(results)}

{in_words(run)}

`{plan.strip()}` (■ full attention, □ {mixers}{", ◧ heads of both" if plan.has_heads else ""})

{_OWN_TYPE if host.travelling else f"An ordinary `{host.name}` checkpoint. {_STOCK}"}

{code_block(snippet, "python")}
{_TOKENIZER if misreads_tokenizer(host.model_type) else ""}
| model | recall | 95 % interval | perplexity | cache at {int(context):,} tokens |
|---|---|---|---|---|
{rows}

Recall: greedy generation, exact match of the whole answer, mean over {tasks}; {run.recipe.evaluate.questions} questions
each at {run.recipe.evaluate.length:,} tokens. Perplexity: {text}.
Cache: one sequence of {int(context):,} tokens. {_lost(results)}
{_worth(results)}
[report.html](report.html) shows the choice, recall by task, perplexity by position, the cache and what each stage
took, on one page; its figures lie in `figures/`.

| served by | from version |
|---|---|
{engines}
{_KERNELS if any(mixer.kernels for mixer in host.mixers.values()) else ""}
Made with the following command; `recipe.yaml`, `plan.json` and `results.json` lie beside this file.

{code_block(shell_command(words), "sh")}
""")


def usage(folder: Path, model_type: str, own_code: bool, chat: bool) -> str:
    """Code that opens the hybrid in `folder`, from the folder around it, and lets it write.

    Args:
        folder: The path, of which the code has the last name only.
        model_type: The host's, as config.json has it.
        own_code: Whether transformers must be allowed to run code that lies in the folder: the tokenizer too reads the
            model's configuration, and would ask in a prompt.
        chat: Whether the tokenizer has a chat template: then the question is put in it.
    """
    tokenizer = "PreTrainedTokenizerFast" if misreads_tokenizer(model_type) else "AutoTokenizer"
    name, trusted = python_string(folder.name), ", trust_remote_code=True" if own_code else ""
    said = "What is the capital of France?" if chat else "The capital of France is"
    prompt = f'tokenizer("{said}", return_tensors="pt")'
    if chat:
        prompt = f"""tokenizer.apply_chat_template(
    [{{"role": "user", "content": "{said}"}}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
)"""
    return f"""from transformers import AutoModelForCausalLM, {tokenizer}

model = AutoModelForCausalLM.from_pretrained({name}{trusted})
tokenizer = {tokenizer}.from_pretrained({name}{trusted})
prompt = {prompt}
written = model.generate(**prompt, max_new_tokens=64)[0, prompt["input_ids"].shape[1] :]
print(tokenizer.decode(written, skip_special_tokens=True))"""


def served_by(engine: Engine, config: PreTrainedConfig) -> str:
    """One line of the table of engines, about this checkpoint."""
    if not engine.fits(config):
        return f"| {engine.name} | no: it needs {engine.needs}. {engine.otherwise}".rstrip() + " |"
    takes = f"; {engine.takes}" if engine.takes else ""
    return f"| {engine.name} | {engine.version} ({engine.known}){takes} |"


def _lost(results: Results) -> str:
    """The hybrid against its teacher."""
    found = results.comparisons
    text = f"Against the teacher, paired: recall {points(found['recall_hybrid_minus_teacher'])}"
    ratio = found.get("perplexity_hybrid_over_teacher")
    return f"{text}, perplexity {times(ratio)}." if ratio else f"{text}."


def _worth(results: Results) -> str:
    """The gain of the choice over the baseline, if that was trained as well."""
    gain = results.comparisons.get(f"recall_hybrid_minus_{BASELINE}")
    if not gain:
        return ""
    worth, low, high = (100 * value for value in (gain["difference"], *gain["interval"]))
    return (
        f"\nThe choice is worth {worth:.1f} points of recall ({low:.1f} to {high:.1f}, paired) over\n"
        "the uniform layout of the same budget and training.\n"
    )


def _time(results: Results) -> str:
    """The time of a token, where the budget was in milliseconds."""
    if not results.timing:
        return ""
    return f" {sentence(timing_in_words(cast(Timing, results.timing)))}"


def _row(name: str, score, context: str) -> str:
    low, high = score.to_dict()["recall_interval"]
    figures = f"{100 * score.recall:.1f} % | {100 * low:.1f}-{100 * high:.1f} % | {score.perplexity:.3f}"
    return f"| {_NAMES[name]} | {figures} | {byte_size(score.cache_bytes[context])} |"
