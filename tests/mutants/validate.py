"""Broken followers, shrinkers and tellers of logs."""

from collections.abc import Iterable, Sequence
from typing import Any
from unittest.mock import patch

import kvspec.oracle
import kvspec.validate
from kvspec.conformance.mutants import Registry
from kvspec.conformance.validate import ValidateConformance
from kvspec.errors import ContractError
from kvspec.flight_recorder.events import Event
from kvspec.validate import Judgement, Verdict, Violation, command
from kvspec.validate.choices import Allocator
from kvspec.validate.model import ModelVerdict
from kvspec.validate.shrink import renumbered

registry = Registry(ValidateConformance, kvspec.oracle)


@registry.mutant("VALID-1", "VALID-2", replaces="validate")
def judges_which_page_is_handed_out(events: Iterable[Event]) -> Verdict:
    with patch.object(Allocator, "put_first", lambda *_: None):
        return kvspec.validate.validate(events)


@registry.mutant("VALID-2", replaces="validate")
def goes_on_after_the_first(events: Sequence[Event]) -> Verdict:
    verdict = kvspec.validate.validate(events)
    return Verdict(len(events), None) if len(events) > verdict.events else verdict


@registry.mutant("VALID-2", replaces="validate")
def names_the_event_before(events: Iterable[Event]) -> Verdict:
    verdict = kvspec.validate.validate(events)
    found = verdict.violation
    return verdict if found is None else verdict._replace(violation=found._replace(n=found.n - 1))


@registry.mutant("VALID-2", replaces="validate", reports=("SE-01",))
def looks_at_no_row(events: Iterable[Event]) -> Verdict:
    with patch("kvspec.validate.caching.rows_told", side_effect=RuntimeError("not seen")):
        try:
            return kvspec.validate.validate(events)
        except RuntimeError:
            return Verdict(0, None)


@registry.mutant("VALID-3", replaces="shrink")
def leaves_nothing_out(events: Iterable[Event], violation: Violation) -> list[Event]:
    return [event for event in events if event.n <= violation.n]


@registry.mutant("VALID-3", replaces="shrink")
def keeps_one_event_too_many(events: Sequence[Event], violation: Violation) -> list[Event]:
    shortest = kvspec.validate.shrink(events, violation)
    return renumbered([shortest[0], events[1], *shortest[1:]])


@registry.mutant("VALID-4", replaces="as_pytest")
def tests_the_oracle_instead(events: Sequence[Event], violation: Violation) -> str:
    text = kvspec.validate.as_pytest(events, violation)
    lines = text.splitlines(keepends=True)
    return "".join("    return\n" if "play(" in line else line for line in lines)


@registry.mutant("VALID-5", "VALID-7", replaces="validate_log")
def takes_what_it_could_read_for_the_log(path: Any) -> Judgement:
    return kvspec.validate.validate_log(path)._replace(broken=None)


@registry.mutant("VALID-6", replaces="follow_with_tlc")
def takes_every_event_for_an_action(events: Sequence[Event]) -> ModelVerdict:
    return ModelVerdict(len(events), len(events), None, "")


@registry.mutant("VALID-7", replaces="tell")
def tells_by_the_text_alone(judgement: Judgement, *how: Any) -> int:
    command.tell(judgement, *how)
    return 0


@registry.mutant("VALID-8", replaces="validate")
def takes_nothing_for_a_valid_log(events: Iterable[Event]) -> Verdict:
    try:
        return kvspec.validate.validate(events)
    except ContractError:
        return Verdict(0, None)
