"""Which tokens are computed in which step, and where their KV goes. Spec: SCHED.

`impl` is a namespace with a `Scheduler`, its `Req` and `ServerArgs`, and the pools and caches that
it drives. The model has no weights: its words depend on every slot that it reads.
"""

from kvspec.conformance.scheduler.flights import Flights
from kvspec.conformance.scheduler.pools import Pools
from kvspec.conformance.scheduler.queue import Queue
from kvspec.conformance.scheduler.running import Running
from kvspec.conformance.scheduler.whole import Whole

__all__ = ["SchedulerConformance"]


class SchedulerConformance(Pools, Queue, Running, Flights, Whole):
    """All of it."""
