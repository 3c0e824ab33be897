"""One machine's paid seconds, each with one phase, from its own account of itself."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from spotune.core.protocol import Event, number

# A machine's own account of itself, cleaned: what was cut, doubled or out of order does no harm.


def clean(events: Iterable[Mapping[str, Any]]) -> list[Event]:
    """Events with a time and a name, each once, in order of time (in the given order where times are equal)."""
    found = [dict(one) for one in events if number(one.get("t")) is not None and isinstance(one.get("event"), str)]
    found.sort(key=lambda event: float(event["t"]))
    return [event for _, same in groupby(found, key=lambda event: float(event["t"])) for event in _once(list(same))]


def _once(events: list[Event]) -> Iterable[Event]:
    if len(events) == 1:
        return events
    seen: dict[str, Event] = {}
    for event in events:
        seen.setdefault(json.dumps(event, sort_keys=True, default=str), event)
    return seen.values()


def step_of(event: Mapping[str, Any]) -> int:
    """The step that an event names, 0 where it names none."""
    step = number(event.get("step"))
    return int(step) if step is not None and 0 < step < 1e15 else 0


# One machine's paid seconds, each with one phase.
#
# The engine's interval is the truth about how long was paid; what the machine wrote only divides it. So the
# segments tile the interval exactly, whatever the events say: time that no event explains is ``unknown``.

Phase = Literal[
    "provision", "setup", "load", "restore", "useful", "data_wait",
    "eval", "save_stall", "replayed", "stalled", "idle", "teardown", "unknown",
]  # fmt: skip
PAID_PHASES: tuple[Phase, ...] = (
    "provision", "setup", "load", "restore", "useful", "data_wait",
    "eval", "save_stall", "replayed", "stalled", "idle", "teardown", "unknown",
)  # fmt: skip
# What a machine calls its phases (core/protocol.py) -> ours; "train" is divided by its steps.
_NAMES: dict[Any, Phase] = {
    "setup": "setup", "load": "load", "restore": "restore", "eval": "eval",
    "save": "save_stall", "idle": "idle", "teardown": "teardown",
}  # fmt: skip
MAX_SKEW_S = 900.0  # machines' clocks differ from the engine's by minutes at most


@dataclass(frozen=True)
class Span:
    """A paid interval.

    Attributes:
        setup_s: how long the engine says that ``setup:`` ran.
        is_open: it is still paid for, ``ended_at`` is the time of the report.
    """

    started_at: float
    ended_at: float
    setup_s: float = 0.0
    is_open: bool = False


@dataclass(frozen=True)
class Segment:
    """``again``: it repeats what an earlier attempt had done already."""

    started_at: float
    ended_at: float
    phase: Phase
    again: bool = False

    @property
    def seconds(self) -> float:
        return self.ended_at - self.started_at


@dataclass(frozen=True)
class Step:
    """A step that was completed; ``again``: an earlier attempt had completed it too."""

    step: int
    ended_at: float
    again: bool


def divide(
    span: Span, claimed_at: float | None, events: Iterable[Event], done_before: int
) -> tuple[list[Segment], list[Step]]:
    """Divides a paid interval into segments that tile it, and lists the steps that were completed in it.

    Args:
        claimed_at: when the machine's guard claimed the attempt; None when no guard got that far.
        events: as read, in any order, with lines missing or doubled, from a clock that may be minutes off.
        done_before: the highest step that any earlier attempt is known to have completed.
    """
    marks = clean([*([{"t": claimed_at, "event": "claim"}] if claimed_at is not None else []), *events])
    if not marks:
        return _divide_silence(span), []
    marks = _with_stall(marks)
    offset = clock_offset_s(span, marks[0]["t"], marks[-1]["t"])
    walk = _Walk(span, done_before)
    for mark in marks:
        walk.take(mark, min(max(mark["t"] + offset, span.started_at), span.ended_at))
        if walk.has_ended:
            break
    return walk.finish(), walk.steps


def _with_stall(marks: list[Event]) -> list[Event]:
    """The events with the beginning of a stall as one of them: the last sign of life, which only its end tells."""
    stall = next((mark for mark in marks if mark["event"] == "stall"), None)
    since = number(stall.get("since")) if stall else None
    if stall is None or since is None:
        return marks
    since = min(max(since, marks[0]["t"]), stall["t"])
    before = [mark for mark in marks if mark["t"] <= since]
    after = [mark for mark in marks if mark["t"] > since and mark["event"] not in ("phase", "step")]
    return [*before, {"t": since, "event": "stalled"}, *after]


def clock_offset_s(span: Span, first: float, last: float) -> float:
    """What to add to a machine's times so that they lie within what was paid; 0 where that cannot be told.

    The least shift that fits is taken: a skewed clock moves all events alike. Events that overlap the
    interval and cannot be made to fit within MAX_SKEW_S are left, and clipped.
    """
    if span.started_at <= first and last <= span.ended_at:
        return 0.0
    slack = (span.ended_at - span.started_at) - (last - first)
    is_outside = last < span.started_at or first > span.ended_at
    if slack < 0:
        return span.started_at - first if is_outside else 0.0
    if first < span.started_at:
        offset = span.started_at + min(max(span.setup_s, 0.0), slack) - first
    else:
        offset = span.ended_at - last
    return offset if is_outside or abs(offset) <= MAX_SKEW_S else 0.0


def total(segments: Sequence[Segment]) -> dict[Phase, float]:
    """Seconds by phase, every phase there."""
    sums: dict[Phase, float] = dict.fromkeys(PAID_PHASES, 0.0)
    for segment in segments:
        sums[segment.phase] += segment.seconds
    return sums


def _divide_silence(span: Span) -> list[Segment]:
    """No guard ever spoke: still provisioning while the interval is open, unknown once it has ended."""
    ready = min(span.started_at + max(span.setup_s, 0.0), span.ended_at)
    rest: Phase = "provision" if span.is_open else "unknown"
    return _solid([Segment(span.started_at, ready, "setup"), Segment(ready, span.ended_at, rest)])


class _Walk:
    """Goes over a machine's events once, from the start of its interval to the end."""

    def __init__(self, span: Span, done_before: int) -> None:
        self.span, self.done_before = span, done_before
        self.steps: list[Step] = []
        self.has_ended = False
        self._segments: list[Segment] = []
        self._pending: list[tuple[float, float]] = []  # time in training that no step has accounted for yet
        self._phase: Phase | Literal["train"] = "load"  # from the claim to the first phase: the guard gets ready
        self._cursor: float | None = None

    @property
    def _again(self) -> bool:
        """Whether what happens now repeats an earlier attempt: the last step did."""
        return bool(self.steps) and self.steps[-1].again

    def take(self, event: Event, at: float) -> None:
        # Within an attempt steps only go up: a line that says otherwise is not what it says.
        is_step = event["event"] == "step" and step_of(event) > (self.steps[-1].step if self.steps else 0)
        trains_unsaid = is_step and self._phase != "train" and at > (self._cursor or self.span.started_at)
        if trains_unsaid:
            self._phase = "unknown"  # up to now: the line that said since when is lost
        if self._cursor is None:
            self._open(at)
        else:
            self._advance(at)
        match event["event"]:
            case "phase":
                self._enter(event.get("phase"))
            case "step" if is_step:
                self._close_step(event)
                self._phase = "train" if trains_unsaid else self._phase
            case "stalled":
                self._settle("stalled")
                self._phase = "stalled"
            case "end":
                # An orderly end leaves no step behind; a failure's last, unfinished step is work of unknown use.
                self._settle("unknown" if event.get("reason") in ("failed", "lost") else "teardown")
                self._phase, self.has_ended = "teardown", True

    def finish(self) -> list[Segment]:
        """The segments, up to the end of the interval."""
        self._settle("unknown")
        if self._cursor is not None:
            self._emit(self._cursor, self.span.ended_at, "teardown" if self.has_ended else "unknown")
        return _solid(self._segments)

    def _open(self, at: float) -> None:
        """Before the machine's first word: what the engine calls setup, and the rest."""
        setup_from = max(self.span.started_at, at - max(self.span.setup_s, 0.0))
        self._emit(self.span.started_at, setup_from, "provision")
        self._emit(setup_from, at, "setup")
        self._cursor = at

    def _advance(self, at: float) -> None:
        assert self._cursor is not None
        if self._phase == "train":
            self._pending.append((self._cursor, at))
        else:
            self._emit(self._cursor, at, self._phase, self._again and self._phase in ("eval", "save_stall"))
        self._cursor = at

    def _enter(self, name: Any) -> None:
        self._phase = "train" if name == "train" else _NAMES.get(name if isinstance(name, str) else "", "unknown")
        if self._phase == "teardown":
            self._settle("teardown")

    def _close_step(self, event: Event) -> None:
        step = step_of(event)
        again = step <= self.done_before
        assert self._cursor is not None
        self.steps.append(Step(step, self._cursor, again))
        wait = max(0.0, number(event.get("data_wait_s")) or 0.0)
        pieces, self._pending = self._pending, []
        for started_at, ended_at in pieces:  # a step begins with its batch
            waited_to = min(started_at + wait, ended_at)
            wait -= waited_to - started_at
            self._emit(started_at, waited_to, "data_wait", again)
            self._emit(waited_to, ended_at, "replayed" if again else "useful", again)

    def _settle(self, phase: Phase) -> None:
        pieces, self._pending = self._pending, []
        for started_at, ended_at in pieces:
            self._emit(started_at, ended_at, phase)

    def _emit(self, started_at: float, ended_at: float, phase: Phase, again: bool = False) -> None:
        self._segments.append(Segment(started_at, ended_at, phase, again))


def _solid(segments: Iterable[Segment]) -> list[Segment]:
    """In order of time, without empty ones."""
    return sorted((one for one in segments if one.ended_at > one.started_at), key=lambda one: one.started_at)
