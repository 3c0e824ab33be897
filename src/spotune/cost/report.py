"""The report: what the bucket and the engine hold on one run -> the JSON of the contract. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

from spotune.core.keys import commit_of
from spotune.core.money import HOUR_S, cost_usd, on_demand_price
from spotune.core.protocol import NOT_FINITE, as_json, as_number, number
from spotune.core.records import SCHEMA_VERSION, PriceRow
from spotune.cost.account import Account, build_accounts, gpu_figures
from spotune.cost.index import data_rows
from spotune.cost.machines import PAID_PHASES, Evidence, Phase, Segment, step_of, total
from spotune.launch.engine import ACTIVE, State

# Long series made short enough to draw, without changing what they say.

Point = TypeVar("Point")


def spread(points: Sequence[Point], most: int) -> list[Point]:
    """At most ``most`` of the points, evenly picked, the first and the last among them."""
    if len(points) <= most:
        return list(points)
    return [points[round(index * (len(points) - 1) / (most - 1))] for index in range(most)]


def strip(segments: Sequence[Segment], start: float, most: int) -> list[list[float | str]]:
    """``[offset_s, seconds, phase]`` from ``start`` on: neighbours of one phase joined, in at most ``most`` pieces.

    Where there would be more, the time is cut into slices, each with the phase that has most of it: for a
    picture only. The sums by phase are made from the segments themselves.
    """
    joined = _join(segments)
    if len(joined) > most:
        joined = _join(_slices(joined, most))
    return [[one.started_at - start, one.seconds, one.phase] for one in joined]


def _join(segments: Sequence[Segment]) -> list[Segment]:
    joined: list[Segment] = []
    for one in segments:
        if joined and joined[-1].phase == one.phase:
            joined[-1] = Segment(joined[-1].started_at, one.ended_at, one.phase)
        else:
            joined.append(Segment(one.started_at, one.ended_at, one.phase))
    return joined


def _slices(segments: Sequence[Segment], count: int) -> list[Segment]:
    began, width = segments[0].started_at, (segments[-1].ended_at - segments[0].started_at) / count
    shares: list[dict[Phase, float]] = [{} for _ in range(count)]
    for one in segments:
        first = min(count - 1, int((one.started_at - began) / width))
        last = min(count - 1, int((one.ended_at - began) / width))
        for index in range(first, last + 1):
            low, high = began + index * width, began + (index + 1) * width
            inside = min(one.ended_at, high) - max(one.started_at, low)
            shares[index][one.phase] = shares[index].get(one.phase, 0.0) + inside
    return [
        Segment(began + index * width, began + (index + 1) * width, max(share, key=lambda phase: share[phase]))
        for index, share in enumerate(shares)
        if share
    ]


def rounded(value: Any) -> Any:
    """Floats to nine decimals, a clock's and a float's own noise; containers are gone through."""
    if isinstance(value, float):
        return round(value, 9)
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, list) else value


# What each lost machine cost the run: what the next one spent until it was where that one had been.
#
#     provision + setup + load + restore + replayed, of the attempt that followed, at that attempt's price
#
# ``replayed`` here is all that is done again, the waits, evaluations and saves between those steps too. What a machine
# spent on leaving, or after its last sign of life, is in its own phases. Waiting for the next one costs nothing.

RESTART: tuple[Phase, ...] = ("provision", "setup", "load", "restore")


def preemptions(accounts: Sequence[Account]) -> list[dict[str, Any]]:
    """One for each machine that went while the run was not over, in order; ``attempt`` is the one that was lost."""
    return [_cost(lost, following) for lost, following in pairwise(accounts) if not lost.stands_still]


def _cost(lost: Account, following: Account) -> dict[str, Any]:
    sums = total([segment for segment in following.segments if not segment.again])
    seconds = {f"{phase}_s": sums[phase] for phase in RESTART}
    seconds["replayed_s"] = sum(segment.seconds for segment in following.segments if segment.again)
    paid_s = sum(seconds.values())
    return {
        "attempt": lost.machine.attempt,
        "at": lost.span.ended_at,
        "end_reason": lost.end_reason,
        "waited_s": max(0.0, following.span.started_at - lost.span.ended_at),
        **seconds,
        "paid_s": paid_s,
        "cost_usd": cost_usd(paid_s, following.nodes, following.price),
    }


# What a bucket costs beside the machines: estimates from the bytes that went to and fro, at public list prices.
#
# No row of an engine has them. Whether a byte crossed a region, or left a cloud, is not known: both are said, for all
# bytes. List prices as of 2026-11: https://aws.amazon.com/s3/pricing/, https://cloud.google.com/storage/pricing (the
# first tier, US regions). A bucket in a folder costs nothing that is known here.

GB = 1e9


@dataclass(frozen=True)
class Rates:
    """US dollars a GB: kept for a month, moved to another region of the same cloud, moved out of the cloud."""

    month: float
    region: float
    out: float


RATES = {"s3": Rates(0.023, 0.02, 0.09), "gs": Rates(0.020, 0.02, 0.12)}


def estimates(evidence: Evidence, bucket: str) -> dict[str, Any]:
    """Bytes kept, sent and fetched, and what they cost at most; the dollars are None for a bucket without a price."""
    sent: dict[tuple[int, int], float] = {}
    for attempt, events in evidence.events.items():
        for event in events:
            if event.get("event") == "commit" and (size := number(event.get("bytes"))) is not None:
                sent[attempt, step_of(event)] = size
    kept = {(commit.attempt, commit.step): _size(commit.files) for commit in evidence.commits}
    sent |= kept
    result = float(_size(evidence.certificate.files)) if evidence.certificate else 0.0
    fetched = 0.0
    for events in evidence.events.values():
        restored = (str(event.get("commit")) for event in events if event.get("event") == "restored")
        fetched += sum(sent.get(found, 0.0) for key in restored if (found := commit_of(key)))
    stored, moved = sum(kept.values()) + result, sum(sent.values()) + result + fetched
    rates = RATES.get(bucket.partition(":")[0])
    return {
        "is_estimate": True,
        "stored_bytes": int(stored),
        "sent_bytes": int(sum(sent.values()) + result),
        "fetched_bytes": int(fetched),
        "storage_usd_per_month": rates and stored / GB * rates.month,
        "other_region_usd": rates and moved / GB * rates.region,
        "other_cloud_usd": rates and moved / GB * rates.out,
    }


def _size(files: Mapping[str, Mapping[str, Any]]) -> int:
    return sum(int(number(file.get("size")) or 0) for file in files.values())


# The report: what the bucket and the engine hold on one run -> the JSON of the contract. Pure.
#
# How the figures are made:
#
# paid_s          wall seconds of the paid intervals (an open one up to now); nodes multiply dollars, not seconds
# cost_usd        sum over intervals of hours x nodes x the frozen price of one node where it landed
# goodput         useful_s / paid_s
# on_demand_usd   the same useful work, undisturbed, at the cheapest frozen on-demand row with the accelerators that
#                 ran (each kind's own where several did), x nodes: useful_steps x the mean time of a step (useful +
#                 data_wait, first times only), eval and save_stall (first times only), one provision + setup + load
#                 (those of the first machine that trained), one teardown (that of the last that did)
# saved_usd       on_demand_usd - cost_usd
# useful_steps    distinct steps known to be completed; replayed_steps: completions of a step that an earlier
#                 attempt had completed already
# usd_per_million_tokens   cost_usd / tokens trained that are in the result so far
# data_rows       what tokenizing took away from each source, as the newest attempt counted: datarows.py
# preemptions     what each lost machine cost: preemptions.py; gpu_*: gpus.py; estimates (one run only): estimates.py
# unreconciled_s  the part of paid_s that is by the machine's own clock, the engine's row being lost
#
# A figure that cannot be known is null: cost without a frozen price, goodput of nothing paid, GPU use without a GPU.

_MAX_POINTS = 400
_FEWEST_PLACES = 20
_MOST_TOKENS = 2**53  # more is no count
_GREATEST_LOSS = 1e30  # what can be drawn


def build_report(
    evidence: Evidence,
    state: State,
    now: float,
    accounts: Sequence[Account] | None = None,
    is_drawn: bool = True,
    is_heard: bool = True,
) -> dict[str, Any]:
    """The report as ``cost RUN --format json`` prints it, and what its page draws.

    Args:
        accounts: as ``build_accounts`` makes them of the same evidence, where they are at hand.
        is_drawn: with each attempt's losses and timeline.
        is_heard: whether the state is the engine's word; else nothing is known of the time since the last sign of life.
    """
    accounts = build_accounts(evidence, now, state) if accounts is None else accounts
    run = evidence.run
    is_over = state not in ACTIVE
    phases = _phases(evidence, accounts, state if is_heard else None, now)
    paid_s = sum(account.paid_s for account in accounts)
    costs = [account.cost_usd for account in accounts if account.cost_usd is not None]
    cost_usd = sum(costs) if costs or not accounts else None
    done = _steps_done(evidence, accounts)
    on_demand = _on_demand(evidence.prices, accounts, done)
    tokens, is_priced = _tokens(evidence), all(account.price for account in accounts)
    report = {
        "schema_version": SCHEMA_VERSION,
        "run_id": run.run_id,
        "state": state,
        "user": run.user,
        "team": run.team,
        "kind": run.kind,
        "config": run.config_path,
        "submitted_at": run.created_at,
        "started_at": min((account.span.started_at for account in accounts), default=None),
        "ended_at": max(account.span.ended_at for account in accounts) if accounts and is_over else None,
        "attempts": [
            _attempt_row(account) | (_curves(account, run.created_at, accounts) if is_drawn else {})
            for account in accounts
        ],
        "phases": phases,
        "paid_s": paid_s,
        "cost_usd": cost_usd,
        "budget_usd": run.budget_usd,
        "on_demand_usd": on_demand.get("usd"),
        "saved_usd": None if not is_priced or cost_usd is None or not on_demand else on_demand["usd"] - cost_usd,
        "on_demand": on_demand or None,
        "goodput": phases["useful_s"] / paid_s if paid_s > 0 else None,
        "useful_steps": done,
        "replayed_steps": sum(step.again for account in accounts for step in account.steps),
        "tokens": tokens,
        "data_rows": data_rows(evidence.events),
        "weights_sha256": evidence.certificate.weights_sha256 if evidence.certificate else None,
        **gpu_figures(accounts),
        "usd_per_million_tokens": cost_usd / tokens * 1e6 if is_priced and cost_usd is not None and tokens else None,
        "preemptions": preemptions(accounts),
        "unreconciled_s": sum(account.paid_s for account in accounts if account.machine.interval is None),
        "unpriced_s": sum(account.paid_s for account in accounts if account.price is None),
        "reported_at": now,
        "unread": list(evidence.unread),
    }
    return {name: rounded(value) for name, value in report.items()}


def _attempt_row(account: Account) -> dict[str, Any]:
    row, record, place = account.machine.interval, account.machine.record, account.place
    return {
        "attempt": account.machine.attempt,
        "infra": place.infra,
        "region": place.region,
        "zone": place.zone,
        "instance_type": place.instance_type,
        "accelerators": place.accelerators,
        "nodes": account.nodes,
        "use_spot": place.use_spot,
        "price_usd_per_hour": account.price.price_usd_per_hour if account.price else None,
        "price_source": account.price.source if account.price else "no price was frozen for this machine",
        "started_at": account.span.started_at,
        "ended_at": None if account.span.is_open else account.span.ended_at,
        "paid_s": account.paid_s,
        "cost_usd": account.cost_usd,
        "end_reason": account.end_reason,
        "first_step": account.steps[0].step if account.steps else None,
        "last_step": max([*account.committed, *(step.step for step in account.steps)], default=None),
        "reconciled": row is not None,
        "claimed": record is not None,
        "cluster": record.cluster_name if record else "",
        "gpu_share": record.gpu_share if record else 0.0,
        "phases": {f"{phase}_s": seconds for phase, seconds in total(account.segments).items()},
        "commits": list(account.committed),
        "losses_not_finite": _losses_not_finite(account),
    }


def _losses_not_finite(account: Account) -> list[list[Any]]:
    """``[step, "nan"]`` for each logged loss that is NaN or infinite; of very many some."""
    logged = [event for event in account.events if event["event"] == "log" and step_of(event)]
    found = [[step_of(event), as_json(as_number(event.get("loss")))] for event in logged]
    return spread([point for point in found if point[1] in NOT_FINITE], _MAX_POINTS)


def _curves(account: Account, began: float, accounts: Sequence[Account]) -> dict[str, Any]:
    """What the page draws: on an axis from submission to the end an attempt has only so many places."""
    length_s = max(1.0, max(one.span.ended_at for one in accounts) - began)
    places = max(_FEWEST_PLACES, int(_MAX_POINTS * min(1.0, account.paid_s / length_s)))
    points = [
        [step_of(event), event["loss"]]
        for event in account.events
        if event["event"] == "log" and step_of(event) and _can_be_drawn(number(event.get("loss")))
    ]
    return {
        "losses": spread(points, _MAX_POINTS),
        "timeline": strip(account.segments, account.span.started_at, places),
    }


def _can_be_drawn(loss: float | None) -> bool:
    return loss is not None and abs(loss) < _GREATEST_LOSS


def _phases(evidence: Evidence, accounts: Sequence[Account], state: State | None, now: float) -> dict[str, float]:
    sums = total([segment for account in accounts for segment in account.segments])
    return {"queue_s": _queue_s(evidence, accounts, state, now)} | {f"{phase}_s": sums[phase] for phase in PAID_PHASES}


def _queue_s(evidence: Evidence, accounts: Sequence[Account], state: State | None, now: float) -> float:
    """Waiting for a machine, unpaid. A run that stands still until somebody resumes it does not wait for one."""
    waited, free_at, is_waiting = 0.0, evidence.run.created_at, True
    for account in accounts:
        if is_waiting:
            waited += max(0.0, account.span.started_at - free_at)
        free_at = max(free_at, account.span.ended_at)
        is_waiting = not account.stands_still
    if is_waiting and state in ACTIVE and not (accounts and accounts[-1].span.is_open):
        waited += max(0.0, now - free_at)
    elif is_waiting and state == "CANCELLED" and evidence.cancelled_at is not None:  # before the next machine came
        waited += max(0.0, evidence.cancelled_at - free_at)
    return waited


def _on_demand(rows: Sequence[PriceRow], accounts: Sequence[Account], done: int) -> dict[str, Any]:
    """The counterfactual: seconds, price and dollars; empty where no step or no price says what it would have cost.

    What ran on several kinds of GPU is priced by kind: nobody knows how long one would have taken for another's steps.
    """
    if not accounts:
        return _nothing(rows)
    ran = {account.place.accelerators for account in accounts}
    kinds = [(account.machine.interval, account.place.accelerators) for account in accounts]
    known = [{accelerators} if row or accelerators else ran for row, accelerators in kinds]
    prices = [on_demand_price(accelerators, rows) for accelerators in known]
    steps = sum(not step.again for account in accounts for step in account.steps)
    if not steps or None in prices:
        return {}
    trained = [account for account in accounts if account.steps]
    seconds = usd_seconds = 0.0
    for account, price in zip(accounts, prices, strict=True):
        assert price
        fresh = total([segment for segment in account.segments if not segment.again])
        # Steps that are known to be done, though the events that would time them are lost, take what the others took.
        spent = (fresh["useful"] + fresh["data_wait"]) * done / steps + fresh["eval"] + fresh["save_stall"]
        if account is trained[0]:
            spent += fresh["provision"] + fresh["setup"] + fresh["load"]
        if account is trained[-1]:
            spent += fresh["teardown"]
        seconds += spent
        usd_seconds += spent * price.price_usd_per_hour
    nodes, hourly = max(account.nodes for account in accounts), usd_seconds / seconds if seconds else 0.0
    dearest = max((price for price in prices if price), key=lambda price: price.price_usd_per_hour)
    return {"usd": seconds / HOUR_S * nodes * hourly, "seconds": seconds, "nodes": nodes,
            "price_usd_per_hour": hourly, "instance_type": dearest.instance_type, "infra": dearest.infra}  # fmt: skip


def _nothing(rows: Sequence[PriceRow]) -> dict[str, Any]:
    """What no work would have cost on demand: nothing, at the cheapest frozen price; empty without one."""
    prices = [row for row in rows if not row.use_spot]
    if not prices:
        return {}
    cheapest = min(prices, key=lambda row: row.price_usd_per_hour)
    return {"usd": 0.0, "seconds": 0.0, "nodes": 1, "price_usd_per_hour": cheapest.price_usd_per_hour,
            "instance_type": cheapest.instance_type, "infra": cheapest.infra}  # fmt: skip


def _steps_done(evidence: Evidence, accounts: Sequence[Account]) -> int:
    """Distinct steps completed. Steps begin at 1: a commit of step n speaks for all n, also where events are lost."""
    committed = max((step for account in accounts for step in account.committed), default=0)
    if evidence.certificate:
        committed = max(committed, evidence.certificate.step)
    seen = {step.step for account in accounts for step in account.steps}
    return committed + sum(step > committed for step in seen)


def _tokens(evidence: Evidence) -> int:
    """Tokens trained up to the certified step, else up to the newest commit, else as the events say."""
    commits = sorted(evidence.commits, key=lambda commit: (commit.attempt, commit.step))
    if certificate := evidence.certificate:
        commits = [commit for commit in commits if commit.step == certificate.step] or commits
    if commits:
        return commits[-1].tokens
    counts = [number(event.get("tokens")) for events in evidence.events.values() for event in events]
    return int(max((count for count in counts if count is not None and count < _MOST_TOKENS), default=0))
