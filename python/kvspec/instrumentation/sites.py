"""Who called: file, line and function. Spec: INSTR-3."""

import os
from collections.abc import Iterable
from types import CodeType, FrameType
from typing import NamedTuple, TypeAlias

__all__ = ["Mark", "Site", "Sites", "told"]

_ROOM = "kvspec"
_SCHEDULER = "kvspec.replay"
"""It calls as an engine does, so its lines are call sites."""

Mark: TypeAlias = tuple[int, str, CodeType, int]
"""An action as it is kept: its number, its name, and the instruction that called it."""


class Site(NamedTuple):
    """What an action was, and who called it."""

    action: int
    name: str
    at: str
    """`engine/scheduler.py:88 run_batch`; the file relative to where the process is, if below."""


class Sites:
    """The call sites of the last actions, in a ring; read when somebody asks."""

    def __init__(self, objects: Iterable[object], count: int) -> None:
        self._ring: list[Mark | None] = [None] * count
        self._count = count
        modules = {kind.__module__ for given in objects for kind in type(given).__mro__}
        self._modules = modules - {"builtins", "abc", "typing"}
        self._inside: set[str] = set()
        """Files whose frames are not told."""
        self._outside: set[str] = set()

    def note(self, action: int, name: str, frame: FrameType) -> Mark:
        """Keep the call site of an action: the innermost frame that is outside (INSTR-3).

        O(frames inside). The instruction is kept, since counting lines costs a microsecond.
        """
        code = frame.f_code
        if code.co_filename not in self._outside:
            frame = self._innermost(frame)
            code = frame.f_code
        mark = action, name, code, frame.f_lasti
        self._ring[action % self._count] = mark
        return mark

    def _innermost(self, frame: FrameType) -> FrameType:
        """The innermost frame that is outside; where none is, the innermost."""
        inside, at = self._inside, frame
        while at.f_code.co_filename in inside or not self._is_outside(at):
            if at.f_back is None:
                return frame
            at = at.f_back
        return at

    def _is_outside(self, frame: FrameType) -> bool:
        """Whether a frame is outside; of its file that is known from now on, if it has one."""
        file = frame.f_code.co_filename
        if file in self._outside:
            return True
        module = str(frame.f_globals.get("__name__"))
        ours = module.partition(".")[0] == _ROOM and not module.startswith(_SCHEDULER)
        outside = module not in self._modules and not ours
        if not file.startswith("<"):
            (self._outside if outside else self._inside).add(file)
        return outside

    def find(self, action: int) -> Site | None:
        """The call site of an action, None if it is no longer known."""
        mark = self._ring[action % self._count]
        return told(mark) if mark is not None and mark[0] == action else None


def told(mark: Mark) -> Site:
    """An action and its call site. O(lines of the function)."""
    action, name, code, instruction = mark
    file, here = code.co_filename, os.getcwd()
    if file.startswith(here + os.sep):
        file = file[len(here) + 1 :]
    lines = [line for start, stop, line in code.co_lines() if start <= instruction < stop]
    line = next((line for line in lines if line is not None), code.co_firstlineno)
    return Site(action, name, f"{file}:{line} {code.co_name}")
