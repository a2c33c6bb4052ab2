"""What a budget of host memory must do. Spec: BUDGET."""

from kvspec.conformance.memory_budget.limits import LimitsConformance
from kvspec.conformance.memory_budget.ranks import RanksConformance
from kvspec.conformance.memory_budget.reserving import ReservingConformance

__all__ = ["MemoryBudgetConformance"]


class MemoryBudgetConformance(LimitsConformance, ReservingConformance, RanksConformance):
    """`impl` may hold a class `MemoryBudget`, which then stands in for that of kvspec."""
