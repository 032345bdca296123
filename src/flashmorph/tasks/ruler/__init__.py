"""RULER's tasks in RULER's words (Hsieh et al., arXiv 2404.06654), made offline at any length and depth."""

from flashmorph.tasks.ruler.forms import FORMS
from flashmorph.tasks.ruler.ruler import Ruler

__all__ = ["FORMS", "Ruler"]
