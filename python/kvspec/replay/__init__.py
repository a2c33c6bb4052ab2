"""Real or generated traffic, driven through a cache as a scheduler would. Spec: REPLAY.

trace       files of block ids, and the tokens of a block       REPLAY-1, REPLAY-2
workload    what is served when there is no trace               REPLAY-8
system      the pools and the cache, and the way of a request   REPLAY-3, REPLAY-9
checks      what is looked at meanwhile, and recorded           REPLAY-13 to REPLAY-16
run         a whole trace, and what is counted                  REPLAY-4 to REPLAY-7, REPLAY-10
report      the JSON and the table
plot        hit rate against capacity, and use over the trace
"""

from kvspec.replay.plot import plot_hit_rates
from kvspec.replay.report import as_json, as_table, as_window_table
from kvspec.replay.run import LockstepError, Run, Sample, WindowRun, replay
from kvspec.replay.system import Implementation, Request, Use, implementation
from kvspec.replay.trace import Trace, TraceError, TraceRequest, block_tokens, read_trace
from kvspec.replay.workload import generate

__all__ = [
    "Implementation",
    "LockstepError",
    "Request",
    "Run",
    "Sample",
    "Trace",
    "TraceError",
    "TraceRequest",
    "Use",
    "WindowRun",
    "as_json",
    "as_table",
    "as_window_table",
    "block_tokens",
    "generate",
    "implementation",
    "plot_hit_rates",
    "read_trace",
    "replay",
]
