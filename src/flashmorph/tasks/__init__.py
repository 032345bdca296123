"""Synthetic long-context retrieval: problems as text, laid out in a haystack with marked answers.

A new task is one file with one function and one line in `questions.TASKS`.
"""

from flashmorph.tasks.haystack import Haystack
from flashmorph.tasks.layout import Example, Layout
from flashmorph.tasks.lines import Lines
from flashmorph.tasks.prompt import Prompt
from flashmorph.tasks.questions import TASKS, TaskSettings, make_example
from flashmorph.tasks.ruler import Ruler
from flashmorph.tasks.style import STYLES, Style
from flashmorph.tasks.words import SPLITS, names

__all__ = [
    "SPLITS",
    "STYLES",
    "TASKS",
    "Example",
    "Haystack",
    "Layout",
    "Lines",
    "Prompt",
    "Ruler",
    "Style",
    "TaskSettings",
    "make_example",
    "names",
]
