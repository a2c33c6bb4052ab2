"""Which tokens are computed in which step, and where their KV goes. Spec: SCHED."""

from kvspec.interfaces.scheduler import FinishReason, LiveReq, SchedulerView, StepOutput, TokenInfo
from kvspec.scheduler.policy import SchedulePolicy
from kvspec.scheduler.req import Req
from kvspec.scheduler.scheduler import Scheduler
from kvspec.scheduler.server_args import ServerArgs

__all__ = [
    "FinishReason",
    "LiveReq",
    "Req",
    "SchedulePolicy",
    "Scheduler",
    "SchedulerView",
    "ServerArgs",
    "StepOutput",
    "TokenInfo",
]
