"""All that is known of a run, before anything is made of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from spotune.contracts.events import Event
from spotune.contracts.records import AttemptRecord, Bill, Certificate, Commit, PriceRow, RunRecord
from spotune.launch.infra import PaidInterval


@dataclass(frozen=True)
class Evidence:
    """What the bucket and the engine hold on one run.

    Attributes:
        intervals: the engine's rows; empty where its history is not to be had.
        events: by attempt, as read.
        certificate: there when the run is certified.
        parts: by attempt, the price of its part of a dev cluster, where it ran on one.
        cancelled_at: when it was cancelled, epoch seconds; None where it was not.
        unread: a line for each record that cannot be read; the rest is as if it had never been written.
    """

    run: RunRecord
    intervals: Sequence[PaidInterval] = ()
    attempts: Sequence[AttemptRecord] = ()
    events: Mapping[int, Sequence[Event]] = field(default_factory=dict)
    commits: Sequence[Commit] = ()
    certificate: Certificate | None = None
    bills: Sequence[Bill] = ()
    parts: Mapping[int, PriceRow] = field(default_factory=dict)
    cancelled_at: float | None = None
    unread: Sequence[str] = ()

    @cached_property
    def prices(self) -> Sequence[PriceRow]:
        """As frozen at submission. Raises BadRecord."""
        return self.run.price_rows()
