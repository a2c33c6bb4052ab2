"""What an allocation really does, observed rather than recited. Spec: CHAIN.

child          the process that allocates, touches and frees
ring           what the interposer writes while it does
strace         system calls, where strace is there
recording      runs the child, and keeps what everybody said
smaps          /proc/PID/maps and smaps
observation    what a recording says, fact by fact
chain          the same as a chain of lines
processes      the memory of a running process
kernel_facts   a process that asks the kernel when pages come
claims         what is said of these chains, and what this machine does
report         tables and JSON
plot           the timeline, drawn
"""

from kvspec.allocation_chain.chain import Line, chain
from kvspec.allocation_chain.claims import Claim, Facts, claims, gather
from kvspec.allocation_chain.observation import Observation, observe
from kvspec.allocation_chain.plot import plot_timeline
from kvspec.allocation_chain.processes import ProcessMemory, by_kind, process_memory
from kvspec.allocation_chain.recording import Recording, Request, TouchBy, record
from kvspec.allocation_chain.report import (
    as_json,
    as_tables,
    chain_table,
    claims_table,
    not_observed,
    parse_bytes,
    process_tables,
)
from kvspec.allocation_chain.smaps import changes, holding, read_maps, read_smaps
from kvspec.allocation_chain.strace import strace_calls

__all__ = [
    "Claim",
    "Facts",
    "Line",
    "Observation",
    "ProcessMemory",
    "Recording",
    "Request",
    "TouchBy",
    "as_json",
    "as_tables",
    "by_kind",
    "chain",
    "chain_table",
    "changes",
    "claims",
    "claims_table",
    "gather",
    "holding",
    "not_observed",
    "observe",
    "parse_bytes",
    "plot_timeline",
    "process_memory",
    "process_tables",
    "read_maps",
    "read_smaps",
    "record",
    "strace_calls",
]
