"""Real or generated traffic, driven through a cache as a scheduler would. Spec: REPLAY.

trace       files of block ids, and the tokens of a block       REPLAY-1, REPLAY-2
workload    what is served when there is no trace               REPLAY-8
run         the way of a request, and what is counted           REPLAY-3 to REPLAY-7
report      the JSON and the table
plot        hit rate against capacity
"""

from kvspec.replay.plot import plot_hit_rates
from kvspec.replay.report import as_json, as_table
from kvspec.replay.run import (
    Implementation,
    LockstepError,
    Request,
    Run,
    implementation,
    replay,
)
from kvspec.replay.trace import Trace, TraceError, TraceRequest, block_tokens, read_trace
from kvspec.replay.workload import generate

__all__ = [
    "Implementation",
    "LockstepError",
    "Request",
    "Run",
    "Trace",
    "TraceError",
    "TraceRequest",
    "as_json",
    "as_table",
    "block_tokens",
    "generate",
    "implementation",
    "plot_hit_rates",
    "read_trace",
    "replay",
]
