"""Records what is asked of a KV-cache memory system, and what came of it. Spec: REC.

events      what is recorded
recorder    the ring and the file       REC-1, REC-3, REC-4, REC-9
keys        ids of pages                REC-3, REC-9
log         the file, written and read  REC-2, REC-5 to REC-8
runs        slots as runs
schema      the events to other languages: `python -m kvspec.flight_recorder.schema`
"""

from kvspec.flight_recorder.log import LogError, read_log
from kvspec.flight_recorder.recorder import FlightRecorder

__all__ = ["FlightRecorder", "LogError", "read_log"]
