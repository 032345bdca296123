"""flashmorph: turn a pretrained Transformer into a hybrid attention model that stock tools load and serve.

As a library:

    model, proof = flashmorph.transplant(teacher)
    morphable, errors = flashmorph.attach(model, calibration_tokens)
    flashmorph.align(morphable, rows, settings, folder)
    selection = flashmorph.select(morphable, "25%", "budgeted-gates", objective)
    hybrid = flashmorph.build(morphable, selection.plan)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from flashmorph.convert.in_memory import transplant
    from flashmorph.errors import UserError
    from flashmorph.model.morphable import attach, build
    from flashmorph.pipeline.morph import morph
    from flashmorph.plan import Budget, Plan, Space
    from flashmorph.selection.search import select
    from flashmorph.stages import align, distill, extend

_HOMES = {
    "__version__": "versions",
    "Budget": "plan",
    "Plan": "plan",
    "Space": "plan",
    "UserError": "errors",
    "align": "stages.align",
    "attach": "model.morphable",
    "build": "model.morphable",
    "distill": "stages.distill",
    "extend": "stages.extend",
    "morph": "pipeline.morph",
    "select": "selection.search",
    "transplant": "convert.in_memory",
}
__all__ = [
    "Budget",
    "Plan",
    "Space",
    "UserError",
    "__version__",
    "align",
    "attach",
    "build",
    "distill",
    "extend",
    "morph",
    "select",
    "transplant",
]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: the command line answers `--help` without loading torch."""
    if name in _HOMES:
        found = getattr(import_module(f"flashmorph.{_HOMES[name]}"), "own_version" if name == "__version__" else name)
        return found() if name == "__version__" else found
    raise AttributeError(f"module 'flashmorph' has no attribute {name!r}")
