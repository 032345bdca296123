"""The choice: its space, the budget, and the resulting plan.

A choice is one option (`full`, `linear`, ...) for each group: a layer, or a key-value head of one. Everything that
discretises scores goes through `Space.best`, so every strategy spends a budget in the same way.
"""

from flashmorph.plan.budget import Budget
from flashmorph.plan.costs import Costs
from flashmorph.plan.enumeration import count_plans, every_plan
from flashmorph.plan.group import Group
from flashmorph.plan.plan import FULL, PLAN_VERSION, Plan
from flashmorph.plan.space import Space

__all__ = ["FULL", "PLAN_VERSION", "Budget", "Costs", "Group", "Plan", "Space", "count_plans", "every_plan"]
