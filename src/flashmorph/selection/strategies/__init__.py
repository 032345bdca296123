"""The ways to choose which layers keep full attention, one file each (or one for a few that share most).

A new strategy is one file with one function and its record, and one line in `STRATEGIES`; the function's summary line
is what `--help` shows.
"""

from flashmorph.selection.strategies.attribution import ATTRIBUTION
from flashmorph.selection.strategies.blocks import FIRST, LAST, MIDDLE
from flashmorph.selection.strategies.budgeted_gates import BUDGETED_GATES
from flashmorph.selection.strategies.exhaustive import EXHAUSTIVE
from flashmorph.selection.strategies.gates import GATES
from flashmorph.selection.strategies.greedy import GREEDY_BACKWARD, GREEDY_FORWARD
from flashmorph.selection.strategies.halo import HALO
from flashmorph.selection.strategies.intervention import INTERVENTION
from flashmorph.selection.strategies.kl import KL
from flashmorph.selection.strategies.l0 import L0
from flashmorph.selection.strategies.race import RACE
from flashmorph.selection.strategies.single_layer import ADD_ONE, DROP_ONE, NLL
from flashmorph.selection.strategies.tolerance import TOLERANCE
from flashmorph.selection.strategies.uniform import UNIFORM
from flashmorph.selection.strategy import Strategy

STRATEGIES: dict[str, Strategy] = {
    "add-one": ADD_ONE,
    "attribution": ATTRIBUTION,
    "budgeted-gates": BUDGETED_GATES,
    "drop-one": DROP_ONE,
    "exhaustive": EXHAUSTIVE,
    "first": FIRST,
    "gates": GATES,
    "greedy-backward": GREEDY_BACKWARD,
    "greedy-forward": GREEDY_FORWARD,
    "halo": HALO,
    "intervention": INTERVENTION,
    "kl": KL,
    "l0": L0,
    "last": LAST,
    "middle": MIDDLE,
    "nll": NLL,
    "race": RACE,
    "tolerance": TOLERANCE,
    "uniform": UNIFORM,
}
DEFAULT_STRATEGY = "budgeted-gates"
BASELINE = "uniform"
"""A strategy that searches nothing: what hybrids are compared with."""
