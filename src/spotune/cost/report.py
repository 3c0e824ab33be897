"""Makes the report: what the bucket and the engine hold on one run -> the JSON of the contract. Pure.

How the figures are made:

paid_s          wall seconds of the paid intervals (an open one up to now); nodes multiply dollars, not seconds
cost_usd        sum over intervals of hours x nodes x the frozen price of one node where it landed
goodput         useful_s / paid_s
on_demand_usd   the same useful work, undisturbed, at the cheapest frozen on-demand row with the accelerators that ran
                (each kind's own if several did), x nodes: useful_steps x the mean time of a step (useful + data_wait,
                first times only), eval and save_stall (first times only), one provision + setup + load (those of the
                first machine that trained), one teardown (that of the last machine that trained)
saved_usd       on_demand_usd - cost_usd
useful_steps    distinct steps known to be completed
replayed_steps  completions of a step that an earlier attempt had completed already
usd_per_million_tokens   cost_usd / tokens trained that are in the result so far
data_rows       what tokenizing took away from each source, as the newest attempt counted: index.data_rows
gpu_*           account.gpu_figures
unreconciled_s  the part of paid_s that is by the machine's own clock, since the engine's row is lost

A figure that cannot be known is null: cost without a frozen price, goodput of nothing paid, GPU use without a GPU.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from spotune.core.keys import commit_of
from spotune.core.money import HOUR_S, cost_usd, on_demand_price
from spotune.core.protocol import NOT_FINITE, as_json, as_number, number
from spotune.core.records import SCHEMA_VERSION, PriceRow
from spotune.cost.account import Account, build_accounts, gpu_figures
from spotune.cost.index import data_rows
from spotune.cost.machines import PAID_PHASES, Phase, RunData, Segment, step_of, total
from spotune.launch.engine import ACTIVE, State

_MAX_POINTS = 400
_FEWEST_PLACES = 20
_MOST_TOKENS = 2**53  # a larger count is damaged
_GREATEST_LOSS = 1e30  # a larger loss cannot be drawn


def build_report(
    run_data: RunData,
    state: State,
    now: float,
    accounts: Sequence[Account] | None = None,
    is_drawn: bool = True,
    is_state_known: bool = True,
) -> dict[str, Any]:
    """Returns the report as ``cost RUN --format json`` prints it, with what its page draws.

    Args:
        accounts: from ``build_accounts`` of the same data, if they exist already.
        is_drawn: with each attempt's losses and timeline.
        is_state_known: the engine reported the state; otherwise the time since the last sign of life is unknown.
    """
    accounts = build_accounts(run_data, now, state) if accounts is None else accounts
    run, certificate, began = run_data.run, run_data.certificate, run_data.run.created_at
    sums = total(segment for account in accounts for segment in account.segments)
    waited_s = _queue_s(run_data, accounts, state if is_state_known else None, now)
    paid_s = sum(account.paid_s for account in accounts)
    costs = [account.cost_usd for account in accounts if account.cost_usd is not None]
    cost_usd = sum(costs) if costs or not accounts else None
    whole_usd = cost_usd if all(account.price for account in accounts) else None  # with a part missing: no comparison
    done = _steps_done(run_data, accounts)
    on_demand = _on_demand(run_data.prices, accounts, done)
    tokens = _tokens(run_data)
    report = {
        "schema_version": SCHEMA_VERSION,
        "run_id": run.run_id,
        "state": state,
        "user": run.user,
        "team": run.team,
        "kind": run.kind,
        "config": run.config_path,
        "submitted_at": began,
        "started_at": min((account.span.started_at for account in accounts), default=None),
        "ended_at": max(account.span.ended_at for account in accounts) if accounts and state not in ACTIVE else None,
        "attempts": [_attempt_row(one) | (_curves(one, began, accounts) if is_drawn else {}) for one in accounts],
        "phases": {"queue_s": waited_s} | {f"{phase}_s": sums[phase] for phase in PAID_PHASES},
        "paid_s": paid_s,
        "cost_usd": cost_usd,
        "budget_usd": run.budget_usd,
        "on_demand_usd": on_demand.get("usd"),
        "saved_usd": None if whole_usd is None or not on_demand else on_demand["usd"] - whole_usd,
        "on_demand": on_demand or None,
        "goodput": sums["useful"] / paid_s if paid_s > 0 else None,
        "useful_steps": done,
        "replayed_steps": sum(step.again for account in accounts for step in account.steps),
        "tokens": tokens,
        "data_rows": data_rows(run_data.events),
        "weights_sha256": certificate.weights_sha256 if certificate else None,
        **gpu_figures(accounts),
        "usd_per_million_tokens": None if whole_usd is None or not tokens else whole_usd / tokens * 1e6,
        "preemptions": _preemptions(accounts),
        "unreconciled_s": sum(account.paid_s for account in accounts if account.machine.interval is None),
        "unpriced_s": sum(account.paid_s for account in accounts if account.price is None),
        "reported_at": now,
        "unread": list(run_data.unread),
    }
    return {name: _rounded(value) for name, value in report.items()}


def _rounded(value: Any) -> Any:
    """Rounds floats to nine decimals, the noise of a clock and of a float; goes through containers."""
    if isinstance(value, float):
        return round(value, 9)
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list) else value


def _attempt_row(account: Account) -> dict[str, Any]:
    record, price = account.machine.record, account.price
    logged = [event for event in account.events if event["event"] == "log" and step_of(event)]
    losses = [[step_of(event), as_json(as_number(event.get("loss")))] for event in logged]
    return {
        "attempt": account.machine.attempt,
        **vars(account.place),
        "nodes": account.nodes,
        "price_usd_per_hour": price.price_usd_per_hour if price else None,
        "price_source": price.source if price else "no price was frozen for this machine",
        "started_at": account.span.started_at,
        "ended_at": None if account.span.is_open else account.span.ended_at,
        "paid_s": account.paid_s,
        "cost_usd": account.cost_usd,
        "end_reason": account.end_reason,
        "first_step": account.steps[0].step if account.steps else None,
        "last_step": max([*account.committed, *(step.step for step in account.steps)], default=None),
        "reconciled": account.machine.interval is not None,
        "claimed": record is not None,
        "cluster": record.cluster_name if record else "",
        "gpu_share": record.gpu_share if record else 0.0,
        "phases": {f"{phase}_s": seconds for phase, seconds in total(account.segments).items()},
        "commits": list(account.committed),
        "losses_not_finite": downsample([point for point in losses if point[1] in NOT_FINITE], _MAX_POINTS),
    }


def _curves(account: Account, began: float, accounts: Sequence[Account]) -> dict[str, Any]:
    """Returns what the page draws of an attempt: losses ``[step, loss]`` and a timeline.

    The timeline has as many pieces as fit the attempt's part of an axis from submission to the end.
    """
    length_s = max(1.0, max(one.span.ended_at for one in accounts) - began)
    places = max(_FEWEST_PLACES, int(_MAX_POINTS * min(1.0, account.paid_s / length_s)))
    points = []
    for event in account.events:
        loss = number(event.get("loss"))
        if event["event"] == "log" and step_of(event) and loss is not None and abs(loss) < _GREATEST_LOSS:
            points.append([step_of(event), event["loss"]])
    timeline = _timeline(account.segments, account.span.started_at, places)
    return {"losses": downsample(points, _MAX_POINTS), "timeline": timeline}


def downsample(points: Sequence[Any], most: int) -> list[Any]:
    """Returns at most ``most`` of the points, evenly picked, with the first and the last."""
    if len(points) <= most:
        return list(points)
    return [points[round(index * (len(points) - 1) / (most - 1))] for index in range(most)]


def _timeline(segments: Sequence[Segment], start: float, most: int) -> list[list[float | str]]:
    """Returns ``[offset_s, seconds, phase]`` from ``start`` on: neighbours of one phase joined, at most ``most``.

    If there were more, the time is cut into slices, each with the phase that has most of it. For a picture only: the
    sums by phase are made from the segments themselves.
    """
    joined = _joined(segments)
    if len(joined) > most:
        joined = _joined(_slices(joined, most))
    return [[one.started_at - start, one.seconds, one.phase] for one in joined]


def _joined(segments: Sequence[Segment]) -> list[Segment]:
    joined: list[Segment] = []
    for one in segments:
        is_same = joined and joined[-1].phase == one.phase
        started_at = joined.pop().started_at if is_same else one.started_at
        joined.append(Segment(started_at, one.ended_at, one.phase))
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


def _preemptions(accounts: Sequence[Account]) -> list[dict[str, Any]]:
    """Returns what each lost machine cost the run, in order; ``attempt`` is the one that was lost.

    A lost machine costs what the next attempt spent until it was as far, at that attempt's price: provision + setup +
    load + restore + replayed. Here ``replayed`` is all that was done again, with the waits, evaluations and saves
    between those steps. What a machine spent on leaving, or after its last sign of life, is in its own phases. Waiting
    for the next machine costs nothing.
    """
    found = []
    for lost, following in pairwise(accounts):
        if lost.waits_for_resume:
            continue
        sums = total(segment for segment in following.segments if not segment.again)
        phases: tuple[Phase, ...] = ("provision", "setup", "load", "restore")
        seconds = {f"{phase}_s": sums[phase] for phase in phases}
        seconds["replayed_s"] = sum(segment.seconds for segment in following.segments if segment.again)
        paid_s = sum(seconds.values())
        found.append(
            {
                "attempt": lost.machine.attempt,
                "at": lost.span.ended_at,
                "end_reason": lost.end_reason,
                "waited_s": max(0.0, following.span.started_at - lost.span.ended_at),
                **seconds,
                "paid_s": paid_s,
                "cost_usd": cost_usd(paid_s, following.nodes, following.price),
            }
        )
    return found


def _queue_s(run_data: RunData, accounts: Sequence[Account], state: State | None, now: float) -> float:
    """Returns the unpaid seconds of waiting for a machine. A run that waits for a ``resume`` does not wait for one."""
    waited, free_at, is_waiting = 0.0, run_data.run.created_at, True
    for account in accounts:
        if is_waiting:
            waited += max(0.0, account.span.started_at - free_at)
        free_at = max(free_at, account.span.ended_at)
        is_waiting = not account.waits_for_resume
    if is_waiting and state in ACTIVE and not (accounts and accounts[-1].span.is_open):
        waited += max(0.0, now - free_at)
    elif is_waiting and state == "CANCELLED" and run_data.cancelled_at is not None:  # before the next machine came
        waited += max(0.0, run_data.cancelled_at - free_at)
    return waited


def _on_demand(rows: Sequence[PriceRow], accounts: Sequence[Account], done: int) -> dict[str, Any]:
    """Returns what the same work would have cost on demand: seconds, price and dollars; empty if that is unknown.

    Without a machine it would have cost nothing, at the cheapest frozen price. Work on several kinds of GPU is priced
    by kind: nobody knows how long one kind would have taken for another's steps.
    """
    if not accounts:
        cheapest = min((row for row in rows if not row.use_spot), key=_hourly, default=None)
        return _plan(0.0, 1, _hourly(cheapest), cheapest) if cheapest else {}
    ran = {account.place.accelerators for account in accounts}
    kinds = [(account.machine.interval, account.place.accelerators) for account in accounts]
    known = [{accelerators} if row or accelerators else ran for row, accelerators in kinds]
    found = [on_demand_price(accelerators, rows) for accelerators in known]
    prices = [price for price in found if price]
    steps = sum(not step.again for account in accounts for step in account.steps)
    if not steps or None in found:
        return {}
    trained = [account for account in accounts if account.steps]
    seconds = usd_seconds = 0.0
    for account, price in zip(accounts, prices, strict=True):
        fresh = total(segment for segment in account.segments if not segment.again)
        # Steps that are known to be done, but whose events are lost, take what the others took.
        spent = (fresh["useful"] + fresh["data_wait"]) * done / steps + fresh["eval"] + fresh["save_stall"]
        if account is trained[0]:
            spent += fresh["provision"] + fresh["setup"] + fresh["load"]
        if account is trained[-1]:
            spent += fresh["teardown"]
        seconds += spent
        usd_seconds += spent * price.price_usd_per_hour
    nodes = max(account.nodes for account in accounts)
    return _plan(seconds, nodes, usd_seconds / seconds if seconds else 0.0, max(prices, key=_hourly))


def _hourly(row: PriceRow) -> float:
    return row.price_usd_per_hour


def _plan(seconds: float, nodes: int, hourly: float, row: PriceRow) -> dict[str, Any]:
    return {"usd": seconds / HOUR_S * nodes * hourly, "seconds": seconds, "nodes": nodes,
            "price_usd_per_hour": hourly, "instance_type": row.instance_type, "infra": row.infra}  # fmt: skip


def _steps_done(run_data: RunData, accounts: Sequence[Account]) -> int:
    """Returns how many steps are done. They begin at 1: a commit of step n proves n steps, even if events are lost."""
    committed = max((step for account in accounts for step in account.committed), default=0)
    if run_data.certificate:
        committed = max(committed, run_data.certificate.step)
    seen = {step.step for account in accounts for step in account.steps}
    return committed + sum(step > committed for step in seen)


def _tokens(run_data: RunData) -> int:
    """Returns the tokens trained up to the certified step, else up to the newest commit, else as the events say."""
    commits = sorted(run_data.commits, key=lambda commit: (commit.attempt, commit.step))
    if certificate := run_data.certificate:
        commits = [commit for commit in commits if commit.step == certificate.step] or commits
    if commits:
        return commits[-1].tokens
    counts = [number(event.get("tokens")) for events in run_data.events.values() for event in events]
    return int(max((count for count in counts if count is not None and count < _MOST_TOKENS), default=0))


# What a bucket costs beside the machines: estimates from the bytes kept and moved, at public list prices.
#
# No engine reports it. Whether a byte crossed a region or left a cloud is unknown: both costs are given, for all bytes.
# US dollars a GB as of 2026-11, the first tier, US regions: https://aws.amazon.com/s3/pricing/,
# https://cloud.google.com/storage/pricing. A bucket in a folder has no price here.

GB = 1e9
# Kept for a month, moved to another region of the same cloud, moved out of the cloud.
RATES = {"s3": (0.023, 0.02, 0.09), "gs": (0.020, 0.02, 0.12)}


def estimates(run_data: RunData, bucket: str) -> dict[str, Any]:
    """Returns bytes kept, sent and fetched, and what they cost at most; no dollars for a bucket without a price."""
    sent: dict[tuple[int, int], float] = {}
    for attempt, events in run_data.events.items():
        for event in events:
            if event.get("event") == "commit" and (size := number(event.get("bytes"))) is not None:
                sent[attempt, step_of(event)] = size
    kept = {(commit.attempt, commit.step): _size(commit.files) for commit in run_data.commits}
    sent |= kept
    result = float(_size(run_data.certificate.files)) if run_data.certificate else 0.0
    fetched = 0.0
    for events in run_data.events.values():
        restored = (str(event.get("commit")) for event in events if event.get("event") == "restored")
        fetched += sum(sent.get(found, 0.0) for key in restored if (found := commit_of(key)))
    stored, sent_bytes = sum(kept.values()) + result, sum(sent.values()) + result
    month, region, out = RATES.get(bucket.partition(":")[0], (None, None, None))
    return {
        "is_estimate": True,
        "stored_bytes": int(stored),
        "sent_bytes": int(sent_bytes),
        "fetched_bytes": int(fetched),
        "storage_usd_per_month": month and stored / GB * month,
        "other_region_usd": region and (sent_bytes + fetched) / GB * region,
        "other_cloud_usd": out and (sent_bytes + fetched) / GB * out,
    }


def _size(files: Mapping[str, Mapping[str, Any]]) -> int:
    return sum(int(number(file.get("size")) or 0) for file in files.values())
