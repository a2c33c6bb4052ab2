"""Who owns every page? Spec: CHECK.

    every page of 1 .. P has exactly one owner: free, pending, tree, a request, reserved

A held page of a window pool is owned by whoever owns the full page whose pair it is. The checker
looks at what there is: it works on `view()`, or on what stands for it, changes nothing, and serves
any implementation.
"""

from kvspec.interfaces.memory_checker import SWATokenInfo
from kvspec.memory_checker.check import Level, check_memory, raise_faults
from kvspec.memory_checker.counts import counting, get_swa_token_info
from kvspec.memory_checker.report import Report, owner_name, report_of
from kvspec.memory_checker.sets import find_faults

__all__ = [
    "Level",
    "Report",
    "SWATokenInfo",
    "check_memory",
    "counting",
    "find_faults",
    "get_swa_token_info",
    "owner_name",
    "raise_faults",
    "report_of",
]
