"""The JSON records in a bucket, and the marks of a run that stands still."""

import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from spotune.core import errors
from spotune.core.errors import BadRecord
from spotune.core.keys import (
    CLUSTERS,
    HOUR_S,
    MOST_USD,
    MOST_USD_PER_HOUR,
    RUNS,
    YEAR_2000,
    Amount,
    AttemptNumber,
    Count,
    ExitCode,
    Files,
    Keys,
    Price,
    Ranks,
    Step,
    Time,
    attempt_of,
    checked,
    cluster_key,
    commit_of,
    revision_of,
)
from spotune.core.store import Store

# The JSON records in the bucket. A reader takes what it knows and ignores the rest, so that a
# launcher of today reads a run that started last week.
#
# Times are epoch seconds (``*_at``), durations seconds (``*_s``), money US dollars (``*_usd``).

SCHEMA_VERSION = 1
_SLACK_S, _SLACK_USD = 60.0, 0.01  # of a bill: what it adds up may be rounded


@dataclass(frozen=True, kw_only=True)
class Record:
    """Base of all records: to and from JSON bytes."""

    schema_version: int = SCHEMA_VERSION

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self), indent=1, sort_keys=True, default=str).encode()

    @classmethod
    def from_bytes(cls, data: bytes, key: str = "record") -> Self:
        """Reads a record; raises BadRecord naming ``key``, and the field if it is one, for what is not that record.

        All fields are checked, down to the innermost value, so that nobody who has a record has to expect more; and
        that it is the record of its key, where that is one of a run.
        """
        try:
            record = cls.from_dict(json.loads(data))
        except (ValueError, RecursionError) as error:  # RecursionError: thousands of brackets
            raise BadRecord(f"{key}: not a {cls.__name__}: {error}") from error
        _check_place(record, key)
        return record

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Raises ValueError, naming the field, for what is no such record. Fields that are not known are ignored."""
        if not isinstance(data, dict):
            raise ValueError("no JSON object")
        return cls(**checked(cls, data))


@dataclass(frozen=True, kw_only=True)
class PriceRow(Record):
    """A price as it was when the run was submitted; ``*`` in region or zone matches any.

    Attributes:
        accelerators: e.g. ``L4:1``; empty for CPU machines.
        price_usd_per_hour: of one node.
        source: where the figure comes from, e.g. ``local price table``.
    """

    infra: str
    region: str = "*"
    zone: str = "*"
    instance_type: str = ""
    accelerators: str = ""
    use_spot: bool
    price_usd_per_hour: Price
    source: str
    at: float = 0.0


@dataclass(frozen=True, kw_only=True)
class RunRecord(Record):
    """``run.json``: what was submitted. Once it is there, no config file is read again.

    What was changed since is a whole record too, ``revisions/<n>.json``; see ``revisions.py``.

    Attributes:
        config: resolved and flat: profile and overrides applied, ``profiles`` gone.
        data_files: what the fingerprint was taken over: one ``{source, url, size, sha256 | etag}`` a file.
        model_files: the same of the base model: ``{name, size, sha256}`` a file, ``{name, revision}`` from a hub.
        save_every: ``50`` (steps), ``5m``, or empty for the default.
        stall_after: ``10m``, ``0`` for no watchdog, or empty for the default.
        prices: a row for every candidate that the run may land on.
        use_spot: whether its machines may be taken away; ``may_be_on_demand``: they may also be others.
        budget_usd: what it may cost in all, as asked for; training pauses there. None: no wall.
        month_usd: without that, the wall that was left to it by the month's budget of ``month_of``, ``user alice``.
        kind: ``prod`` for managed jobs, ``dev`` for interactive runs.
        revision: 0 as submitted; ``allowed`` names what changed with it that may not change by itself:
            keys of the config, ``data``, ``model``, ``versions``.
        allowed_env: names that ``env`` sets because the submitter allowed it. For readers: a machine goes by its own
            environment, since a record is only as trusted as the bucket.
    """

    run_id: str
    created_at: Time
    user: str
    team: str = ""
    kind: str = "prod"
    config_path: str
    profile: str = ""
    overrides: list[str] = field(default_factory=list)
    config: dict[str, Any]
    config_sha256: str
    data_sha256: str
    data_files: list[dict[str, Any]] = field(default_factory=list)
    model_sha256: str = ""
    model_files: list[dict[str, Any]] = field(default_factory=list)
    infra: str = ""
    use_spot: bool = True
    may_be_on_demand: bool = False
    priority: int = 0
    save_every: str = ""
    stall_after: str = ""
    budget_usd: Amount | None = None
    month_usd: Amount | None = None
    month_of: str = ""
    prices: list[dict[str, Any]] = field(default_factory=list)
    code: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    revision: Count = 0
    revised_at: Time = 0.0
    revised_by: str = ""
    allowed: list[str] = field(default_factory=list)
    allowed_env: list[str] = field(default_factory=list)

    @property
    def wall_usd(self) -> float | None:
        """What it may cost in all, by whichever budget; None: no wall."""
        return self.month_usd if self.budget_usd is None else self.budget_usd

    def price_rows(self) -> list[PriceRow]:
        """Raises BadRecord where the record holds what is no price row."""
        rows = []
        for index, row in enumerate(self.prices):
            try:
                rows.append(PriceRow.from_dict(row))
            except ValueError as error:
                keys = Keys(self.run_id)
                key = keys.revision(self.revision) if self.revision else keys.run
                raise BadRecord(f"{key}: prices[{index}]: not a PriceRow: {error}") from error
        return rows


@dataclass(frozen=True, kw_only=True)
class AttemptRecord(Record):
    """``attempt.json``: an attempt's claim. Its key is the fence: created once, never rewritten.

    Attributes:
        gpu_share: how many GPUs of each node it asked a shared cluster for, 0.5 for half of one; 0: not said.
        spells_s: how long each earlier machine of this run lasted that was taken away, seconds, oldest first.
    """

    run_id: str
    attempt: AttemptNumber
    claimed_at: Time
    claim_id: str
    host: str = ""
    infra: str = ""
    region: str = ""
    zone: str = ""
    cluster_name: str = ""
    engine_job_id: str = ""
    num_nodes: Ranks = 1
    ranks_per_node: Ranks = 1
    gpu: str = ""
    gpu_share: Amount = 0.0
    spells_s: list[Amount] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Commit(Record):
    """``commits/<attempt>-<step>.json``: the checkpoint exists because this does.

    Attributes:
        parent: key of the commit that this attempt started from, empty for a fresh start.
        tokens: non-padding tokens trained since step 0, all ranks.
        files: relative path -> {size: bytes, sha256: hex}, below ``checkpoints/<step>-<attempt>/``.
        best_step: step of the best checkpoint so far, where the config asks for the best model.
        global_batch: rows of a step, over all ranks; 0 in records of before it was kept.
        ordinal: its number in the run's line of commits, counted from 1.
        saving: what saving has cost so far on this machine: ``guard/save_schedule.py`` says in which words.
        versions: of the libraries that trained; ``versions.py`` says which.
        revision: of the run's record that was in force.
    """

    run_id: str
    step: Step
    attempt: AttemptNumber
    parent: str = ""
    epoch: Amount = 0.0
    tokens: Count = 0
    world_size: Ranks = 1
    threads: Ranks = 1
    config_sha256: str = ""
    data_sha256: str = ""
    model_sha256: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    committed_at: Time = 0.0
    best_step: Step | None = None
    global_batch: Count = 0
    ordinal: Count = 0
    saving: dict[str, Amount] = field(default_factory=dict)
    revision: Count = 0
    files: Files


@dataclass(frozen=True, kw_only=True)
class Certificate(Record):
    """``output/completed.json``: the result is whole and was read back. Only this makes a run SUCCEEDED."""

    run_id: str
    attempt: AttemptNumber
    step: Step
    weights_sha256: str
    completed_at: Time = 0.0
    files: Files


@dataclass(frozen=True, kw_only=True)
class Progress(Record):
    """``progress.json``: what can be seen while it runs. ``at`` is the heartbeat; a loss that is not finite is text."""

    run_id: str
    attempt: AttemptNumber
    step: Step = 0
    max_steps: Step = 0
    phase: str = ""
    loss: float | str | None = None
    tokens: Count = 0
    committed_step: Step = 0
    at: Time = 0.0


@dataclass(frozen=True, kw_only=True)
class Mark(Record):
    """``failed.json``, ``paused.json``, ``cancelled.json``: why a run stands still until ``resume``.

    Attributes:
        versions: the changed libraries, ``datasets 5.0.1 -> 5.2.0``, where the run failed because of these.
    """

    run_id: str
    attempt: AttemptNumber
    at: Time
    reason: str
    exit_code: ExitCode
    step: Step = 0
    versions: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Bill(Record):
    """``bill.json``: the paid interval of an attempt, where it landed, and the frozen price of that place.

    ``attempt`` 0: of a machine that went before it claimed one, in ``lost/``.

    ``end_reason`` is the report's word, ``reason`` and ``exit_code`` are the engine's own.
    """

    run_id: str
    attempt: AttemptNumber
    started_at: Time
    ended_at: Time
    price: dict[str, Any]
    nodes: Ranks = 1
    paid_s: Amount = 0.0
    cost_usd: Amount = 0.0
    end_reason: str = "lost"
    infra: str = ""
    region: str = ""
    zone: str = ""
    instance_type: str = ""
    accelerators: str = ""
    use_spot: bool = False
    setup_s: Amount = 0.0
    reason: str = ""
    exit_code: int | None = None

    @property
    def price_row(self) -> PriceRow | None:
        """None where it has none, or none that can be read, or one of 0: nobody has told it."""
        try:
            row = PriceRow.from_dict(self.price)
        except ValueError:
            return None
        return row if row.price_usd_per_hour > 0 else None


def _check_place(record: Record, key: str) -> None:
    """Raises BadRecord for a record that another key of a run should have. A key of anything else says nothing."""
    found = re.match(rf"{RUNS}/([^/]+)/", key)
    if found is None:
        return
    match record:
        case RunRecord() if record.run_id != found[1]:  # counted under either name, it would be counted twice
            raise BadRecord(f"{key}: run_id: {record.run_id!r}, not that of its folder (a copy, or renamed)")
        case RunRecord() if record.revision != (revision_of(key) or 0):  # one that says 0 would pass as submitted
            raise BadRecord(f"{key}: revision: {record.revision}, not that of its name (a copy, or renamed)")
        case Commit() if (record.attempt, record.step) != commit_of(key):
            numbers = f"{record.attempt}, {record.step}"
            raise BadRecord(f"{key}: attempt, step: {numbers}, not those of its name (a copy, or renamed)")
        case AttemptRecord() | Bill() if record.attempt != (attempt_of(key) or 0):
            raise BadRecord(f"{key}: attempt: {record.attempt}, not that of its folder (a copy, or renamed)")


def check_paid(record: Record, key: str) -> None:
    """Raises BadRecord for a claim or a bill that money cannot be counted by: its times, or amounts no machine has."""
    match record:
        case AttemptRecord():
            name, began, ended = "claimed_at", record.claimed_at, math.inf
        case Bill():
            name, began, ended = "started_at", record.started_at, record.ended_at
        case _:
            return
    if began < YEAR_2000:
        raise BadRecord(f"{key}: {name}: {began}, before the year 2000")
    if ended < began:
        raise BadRecord(f"{key}: ended_at: {ended}, before {name}")
    if isinstance(record, Bill):
        _check_amounts(record, key)


def _check_amounts(bill: Bill, key: str) -> None:
    """Raises BadRecord for a bill over more than its interval can cost: it would drown what all others sum up to."""
    named = bill.price.get("price_usd_per_hour")
    if isinstance(named, int | float) and named > MOST_USD_PER_HOUR:
        raise BadRecord(f"{key}: price: price_usd_per_hour: more than any machine's, {MOST_USD_PER_HOUR:,}")
    machine_s = (bill.ended_at - bill.started_at) * bill.nodes
    hourly = bill.price_row.price_usd_per_hour if bill.price_row else MOST_USD_PER_HOUR
    most_usd = machine_s / HOUR_S * hourly
    if bill.paid_s > machine_s + _SLACK_S:
        raise BadRecord(f"{key}: paid_s: {bill.paid_s:g}, more than from started_at to ended_at ({machine_s:g})")
    if bill.cost_usd > most_usd * (1 + 1e-6) + _SLACK_USD:
        raise BadRecord(f"{key}: cost_usd: {bill.cost_usd:g}, more than its interval at its price ({most_usd:g})")
    if bill.price_row and most_usd > MOST_USD:
        raise BadRecord(f"{key}: {most_usd:g} US dollars, more than a run costs")


def fingerprint(value: Any) -> str:
    """sha256 (hex) of a value's canonical JSON: the same for the same content, whatever the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":"), default=str).encode()).hexdigest()


# ``failed.json``, ``paused.json``, ``cancelled.json``: a mark is one by being there, for every reader.
#
# What a mark says may be unreadable: cut, of another version, or a link that is not followed. The run stands still all
# the same until ``spotune resume`` removes it.


def read_mark(store: Store, key: str) -> Mark | None:
    """The mark, None where there is none. One that cannot be read says so as its reason, and counts as a failure."""
    try:
        data = store.read(key)
        return None if data is None else Mark.from_bytes(data, key)
    except BadRecord as error:
        return Mark(run_id="", attempt=0, at=0.0, reason=str(error), exit_code=errors.FAILED)


# ``clusters/<name>-<launch>.json``: what a dev cluster was paid for, and its price as it was when it came up.
#
# Unlike a run's records it is rewritten, while its spans grow. Only the launcher writes it: from SkyPilot's own report,
# so that whoever writes last writes no less than was known.


@dataclass(frozen=True, kw_only=True)
class ClusterRecord(Record):
    """One cluster from its launch until it is down; the next of that name has a record of its own.

    Attributes:
        launched_at: when it was first paid for; a cluster that is stopped and started again keeps it.
        owner, team: who brought it up, and pays for what no run does.
        accelerators: of one node, e.g. ``L4:1``; empty for CPU machines.
        price: the row of one node, frozen with the record; empty where no price was known.
        spans: paid intervals ``[started_at, ended_at]`` as SkyPilot counts them; None: it is still paid for.
        updated_at: when SkyPilot was last asked; nothing is known of what came after.
    """

    name: str
    cluster_hash: str
    launched_at: Time
    owner: str
    team: str = ""
    infra: str = ""
    accelerators: str = ""
    nodes: Ranks = 1
    price: dict[str, Any] = field(default_factory=dict)
    spans: list[list[Time | None]] = field(default_factory=list)
    updated_at: Time = 0.0

    def __post_init__(self) -> None:
        """Raises ValueError for spans or a price that are none."""
        if any(len(span) != 2 or span[0] is None for span in self.spans):
            raise ValueError("spans: not pairs of times, of which the last may be null")
        try:
            _ = self.price_row
        except ValueError as error:
            raise ValueError(f"price: {error}") from error

    @property
    def key(self) -> str:
        return cluster_key(self.name, self.launched_at)

    @property
    def is_up(self) -> bool:
        """Whether it was still paid for when SkyPilot was last asked."""
        return bool(self.spans) and self.spans[-1][1] is None

    @property
    def price_row(self) -> PriceRow | None:
        """A price of 0 is none: nobody has told it."""
        row = PriceRow.from_dict(self.price) if self.price else None
        return row if row and row.price_usd_per_hour > 0 else None

    def intervals(self) -> list[tuple[float, float]]:
        """The spans in order and apart from each other; one that is open ends where knowledge does."""
        found: list[tuple[float, float]] = []
        for start, end in sorted(self.spans, key=lambda span: span[0] or 0.0):
            began = max(start or 0.0, found[-1][1] if found else 0.0)
            until = self.updated_at if end is None else end
            if until > began:
                found.append((began, until))
        return found


def read_clusters(
    store: Store, names: Sequence[str] = (), warn: Callable[[str], None] = lambda message: None
) -> list[ClusterRecord]:
    """Those in the bucket, the oldest first; with ``names`` those called so.

    ``warn`` is told, naming the key, of one that cannot be read, which is left out.
    """
    records = []
    for key in store.keys(CLUSTERS):
        stem = key.removeprefix(f"{CLUSTERS}/").rpartition("-")[0]
        if names and stem not in names:
            continue
        try:
            record = ClusterRecord.from_bytes(store.read(key) or b"null", key)
            if record.key != key:
                raise BadRecord(f"{key}: name, launched_at: those of {record.key} (a copy, or renamed)")
            records.append(record)
        except BadRecord as error:
            warn(str(error))
    return sorted(records, key=lambda record: record.launched_at)
