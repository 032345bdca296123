"""flashmorph: turn a pretrained Transformer into a hybrid attention model that stock tools load and serve.

The whole path, with what `flashmorph morph` does: resuming, evidence, a report. The folder is a checkpoint at the end.

    import flashmorph
    from transformers import AutoModelForCausalLM

    run = flashmorph.open_run("tiny", "runs/tiny", changes=["budget=2"])
    results = flashmorph.morph(run)
    print(results.plan.strip(), results.scores["hybrid"].recall)
    model = AutoModelForCausalLM.from_pretrained("runs/tiny")

Its stages by themselves (`examples/morph_in_python.py` has what is left out here):

    model, proof = flashmorph.transplant(teacher)
    morphable, errors = flashmorph.attach(model, calibration_tokens)
    flashmorph.align(morphable, rows, settings, folder)
    selection = flashmorph.select(morphable, "25%", objective=objective)
    hybrid = flashmorph.build(morphable, selection.plan)
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING
from typing import Any as _Any

if TYPE_CHECKING:
    __version__: str
    from flashmorph.convert.in_memory import Proof, transplant
    from flashmorph.convert.load import load_model
    from flashmorph.convert.save import save_model
    from flashmorph.convert.teacher import Teacher, open_teacher
    from flashmorph.data.corpus import Corpus
    from flashmorph.data.rows import pack
    from flashmorph.errors import UserError
    from flashmorph.evaluation import EvaluateSettings, Score, evaluate
    from flashmorph.model.morphable import Morphable, attach, build
    from flashmorph.pipeline.morph import morph
    from flashmorph.plan import Budget, Plan, Space
    from flashmorph.recipe.recipe import Recipe, load_recipe
    from flashmorph.run.open import open_run
    from flashmorph.run.run import Results, Run
    from flashmorph.selection import Selection
    from flashmorph.selection.objective import MorphableObjective
    from flashmorph.selection.search import select
    from flashmorph.selection.searchdata import SearchData, SearchSettings
    from flashmorph.stages import AlignSettings, DistillSettings, ExtendSettings, align, distill, extend
    from flashmorph.tasks import STYLES, Haystack, Layout, TaskSettings

# For __getattr__, as the imports above are for type checkers; tests hold the two against each other.
_NAMES = {
    "convert.in_memory": ("Proof", "transplant"),
    "convert.load": ("load_model",),
    "convert.save": ("save_model",),
    "convert.teacher": ("Teacher", "open_teacher"),
    "data.corpus": ("Corpus",),
    "data.rows": ("pack",),
    "errors": ("UserError",),
    "evaluation": ("EvaluateSettings", "Score", "evaluate"),
    "model.morphable": ("Morphable", "attach", "build"),
    "pipeline.morph": ("morph",),
    "plan": ("Budget", "Plan", "Space"),
    "recipe.recipe": ("Recipe", "load_recipe"),
    "run.open": ("open_run",),
    "run.run": ("Results", "Run"),
    "selection": ("Selection",),
    "selection.objective": ("MorphableObjective",),
    "selection.search": ("select",),
    "selection.searchdata": ("SearchData", "SearchSettings"),
    "stages": ("AlignSettings", "DistillSettings", "ExtendSettings", "align", "distill", "extend"),
    "tasks": ("STYLES", "Haystack", "Layout", "TaskSettings"),
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names}
__all__ = [
    "STYLES",
    "AlignSettings",
    "Budget",
    "Corpus",
    "DistillSettings",
    "EvaluateSettings",
    "ExtendSettings",
    "Haystack",
    "Layout",
    "Morphable",
    "MorphableObjective",
    "Plan",
    "Proof",
    "Recipe",
    "Results",
    "Run",
    "Score",
    "SearchData",
    "SearchSettings",
    "Selection",
    "Space",
    "TaskSettings",
    "Teacher",
    "UserError",
    "__version__",
    "align",
    "attach",
    "build",
    "distill",
    "evaluate",
    "extend",
    "load_model",
    "load_recipe",
    "morph",
    "open_run",
    "open_teacher",
    "pack",
    "save_model",
    "select",
    "transplant",
]


def __getattr__(name: str) -> _Any:
    """Import what is asked for when it is asked for: the command line answers `--help` without loading torch."""
    if name == "__version__":
        return _import_module("flashmorph.versions").own_version()
    if name not in _HOMES:
        raise AttributeError(f"module 'flashmorph' has no attribute {name!r}")
    return getattr(_import_module(f"flashmorph.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """The public names, for completion and `help`."""
    return sorted(__all__)
