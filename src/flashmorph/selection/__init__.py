"""Ways to choose which layers keep full attention.

A new strategy is one file with one function and one line in `STRATEGIES`; its summary line is what `--help` shows.
"""

from flashmorph.selection.budgeted_gates import budgeted_gates
from flashmorph.selection.gates import gates
from flashmorph.selection.greedy_forward import greedy_forward
from flashmorph.selection.strategy import Cost, Objective, Selection, Strategy
from flashmorph.selection.uniform import uniform

STRATEGIES: dict[str, Strategy] = {
    "budgeted-gates": budgeted_gates,
    "gates": gates,
    "greedy-forward": greedy_forward,
    "uniform": uniform,
}
DEFAULT_STRATEGY = "budgeted-gates"

__all__ = ["DEFAULT_STRATEGY", "STRATEGIES", "Cost", "Objective", "Selection", "Strategy"]
