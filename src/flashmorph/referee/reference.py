"""What the plans of one budget are judged against."""

from typing import Literal, Protocol

from flashmorph.plan import Plan
from flashmorph.records import Figures

ReferenceKind = Literal["enumerated", "found"]
"""`enumerated`: the best of all plans (`truth.py`). `found`: the best known plan (`best_known.py`)."""


class Reference(Protocol):
    """The plan that others are compared with on the questions of the referee's split, and how they compare."""

    @property
    def plan(self) -> Plan:
        """The plan that regret is counted from."""
        ...

    @property
    def name(self) -> str:
        """What that plan is called in a table."""
        ...

    def loss(self, plan: Plan) -> float:
        """Mean loss of `plan` over the questions, in nats."""
        ...

    def regret(self, plan: Plan) -> float:
        """Mean loss of `plan` minus that of the reference's plan, in nats."""
        ...

    def rank(self, plan: Plan) -> int | None:
        """The rank of `plan` among all plans; None where not all of them are known."""
        ...

    def half_width(self, plan: Plan) -> float | None:
        """Half of the 95 % interval of the regret, in nats; None where there is none."""
        ...

    def to_dict(self) -> Figures:
        """The entry in compare.json."""
        ...
