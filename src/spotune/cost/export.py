"""A report as flat rows, and rows summed by user, team, place, GPU or time. Pure."""

import csv
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, Literal, get_args

from spotune.core.money import HOUR_S, cost_of
from spotune.cost.account import gpus_of
from spotune.cost.machines import PAID_PHASES

# A report as flat rows: csv of a run's attempts, and one row a run where many are listed.

ATTEMPT = (
    "attempt", "infra", "region", "zone", "instance_type", "accelerators", "nodes", "use_spot",
    "price_usd_per_hour", "price_source", "started_at", "ended_at", "paid_s", "cost_usd", "end_reason",
    "first_step", "last_step",
)  # fmt: skip
_MORE = ("reconciled", "cluster", "gpu_share")
INDEXED = (*ATTEMPT, *_MORE, "useful_s")  # what the index keeps of an attempt
ATTEMPT_ROW = ("run_id", *ATTEMPT, *(f"{phase}_s" for phase in PAID_PHASES))
RUN = (
    "run_id", "state", "user", "team", "kind", "config", "submitted_at", "started_at", "ended_at", "attempts",
    "paid_s", "useful_s", "cost_usd", "on_demand_usd", "saved_usd", "goodput", "useful_steps", "replayed_steps",
    "tokens", "unreconciled_s", "unpriced_s", "budget_usd", "preemptions", "preemptions_usd",
    "usd_per_million_tokens", "gpu_hours", "gpu_busy_hours", "gpu_utilization",
)  # fmt: skip


def attempt_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row an attempt, its phases as columns."""
    return [
        {"run_id": report["run_id"]} | {name: attempt[name] for name in ATTEMPT} | attempt["phases"]
        for attempt in report["attempts"]
    ]


def indexed_attempts(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row an attempt, as the index keeps it."""
    return [
        {name: attempt[name] for name in (*ATTEMPT, *_MORE)} | {"useful_s": attempt["phases"]["useful_s"]}
        for attempt in report["attempts"]
    ]


def run_row(report: Mapping[str, Any]) -> dict[str, Any]:
    """A run in one row: its totals."""
    flat = {
        **report,
        "attempts": len(report["attempts"]),
        "useful_s": report["phases"]["useful_s"],
        "preemptions": len(report["preemptions"]),
        "preemptions_usd": cost_of(report["preemptions"]),
    }
    return {name: flat[name] for name in RUN}


def as_csv(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> str:
    """RFC 4180 with a header line; for no rows that line alone, or nothing where no columns are given.

    What a user typed may start with a sign that a spreadsheet takes for a formula: such a cell gets a quote.
    """
    columns = columns or (list(rows[0]) if rows else [])
    if not columns:
        return ""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\r\n")
    writer.writeheader()
    writer.writerows({name: _harmless(value) for name, value in row.items()} for row in rows)
    return text.getvalue()


def _harmless(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


# Chargeback: attempts summed by who had them, where they ran, on what, or when. Pure.
#
# What is a run's as a whole (on_demand_usd, saved_usd) is said where a run belongs to one group: by user, team and
# kind. It is summed over the runs of which it is known (compared_runs), so that saved_usd compares like with like. A
# sum of dollars of which no part is known is None, and what is not in one for want of a price is unpriced_s. Goodput is
# said where an attempt does. A day or a week has of each attempt the seconds that lie in it. What dev clusters cost
# while no run was on them (idle_usd) is in no other figure: it is their owners', and was somewhere, on something, at
# some time, as an attempt is.

By = Literal["user", "team", "infra", "gpu", "day", "week", "kind"]
BY: tuple[By, ...] = get_args(By)
OF_RUNS = ("user", "team", "kind")
OF_TIME = ("day", "week")
# Of the totals and of the attempts, what is looked at.
COLUMNS = ("attempt", "infra", "accelerators", "nodes", "started_at", "paid_s", "cost_usd", "useful_s", "reconciled")
NOBODY = {"team": "(no team)", "gpu": "cpu", "infra": "(not known)"}

Run = tuple[Any, Mapping[str, Any]]  # its key, its totals or one of its attempts
Idle = Mapping[str, Any]  # of a dev cluster: see clusters.idle_of


@dataclass
class Sums:
    """A group as far as it has been added up."""

    runs: set[Any] = field(default_factory=set)
    attempts: set[Any] = field(default_factory=set)
    paid_s: float = 0.0
    gpu_s: float = 0.0
    useful_s: float = 0.0
    cost_usd: float = 0.0
    on_demand_usd: float = 0.0
    saved_usd: float = 0.0
    compared: int = 0
    unpriced_s: float = 0.0
    unreconciled_s: float = 0.0
    idle_usd: float = 0.0
    idle_unpriced_s: float = 0.0


def group(by: By, runs: Iterable[Run], attempts: Iterable[Run], idle: Iterable[Idle] = ()) -> list[dict[str, Any]]:
    """A row a group, the dearest first; those of time in order of time. Every paid second of the attempts is in one."""
    totals = dict(runs)
    groups: dict[str, Sums] = {}
    for key, attempt in attempts:
        for name, share in _parts(by, totals[key], attempt):
            _add(groups.setdefault(name, Sums()), key, attempt, share)
    if by in OF_RUNS:
        for key, total in totals.items():
            sums = groups.setdefault(_of_run(by, total), Sums())
            sums.runs.add(key)
            if total["saved_usd"] is not None:
                sums.on_demand_usd += total["on_demand_usd"]
                sums.saved_usd += total["saved_usd"]
                sums.compared += 1
    for piece in idle:
        for name, share in _parts(by, piece, piece):
            sums = groups.setdefault(name, Sums())
            sums.idle_usd += (piece["cost_usd"] or 0.0) * share
            sums.idle_unpriced_s += piece["paid_s"] * share if piece["cost_usd"] is None else 0.0
    rows = [_row(by, name, sums) for name, sums in groups.items()]
    return sorted(rows, key=lambda row: row[by] if by in OF_TIME else (-spent_usd(row), row[by]))


def spent_usd(row: Mapping[str, Any]) -> float:
    """What is known of what a group has cost, its idle dev clusters too."""
    return (row["cost_usd"] or 0.0) + (row["idle_usd"] or 0.0)


def _parts(by: By, total: Mapping[str, Any], attempt: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The groups that an attempt belongs to, and its share in each."""
    match by:
        case "day" | "week":
            ended_at = attempt["started_at"] + attempt["paid_s"]
            for start, began, until in cut(by, attempt["started_at"], ended_at):
                yield name_of(by, start), (until - began) / attempt["paid_s"] if attempt["paid_s"] else 1.0
        case "infra":
            yield attempt["infra"] or NOBODY["infra"], 1.0
        case "gpu":
            yield gpus_of(attempt["accelerators"])[0], 1.0
        case _:
            yield _of_run(by, total), 1.0


def _of_run(by: By, total: Mapping[str, Any]) -> str:
    return total[by] or NOBODY.get(by, "(nobody)")


def _add(sums: Sums, key: Any, attempt: Mapping[str, Any], share: float) -> None:
    seconds = attempt["paid_s"] * share
    sums.runs.add(key)
    sums.attempts.add((key, attempt["attempt"], attempt["started_at"]))
    sums.paid_s += seconds
    sums.gpu_s += seconds * attempt["nodes"] * gpus_of(attempt["accelerators"])[1]
    sums.useful_s += attempt["useful_s"] * share
    sums.cost_usd += (attempt["cost_usd"] or 0.0) * share
    sums.unpriced_s += seconds if attempt["cost_usd"] is None else 0.0
    sums.unreconciled_s += 0.0 if attempt["reconciled"] else seconds


def columns(by: By) -> list[str]:
    """What a row has."""
    return list(_row(by, "", Sums()))


def _row(by: By, name: str, sums: Sums) -> dict[str, Any]:
    says_goodput = by not in OF_TIME and sums.paid_s > 0
    return {
        by: name,
        "runs": len(sums.runs),
        "attempts": len(sums.attempts),
        "paid_s": round(sums.paid_s, 3),
        "gpu_hours": round(sums.gpu_s / 3600, 6),
        "cost_usd": _known(sums.cost_usd, sums.unpriced_s),
        "on_demand_usd": round(sums.on_demand_usd, 9) if sums.compared else None,
        "saved_usd": round(sums.saved_usd, 9) if sums.compared else None,
        "compared_runs": sums.compared,
        "goodput": sums.useful_s / sums.paid_s if says_goodput else None,
        "unpriced_s": round(sums.unpriced_s, 3),
        "unreconciled_s": round(sums.unreconciled_s, 3),
        "idle_usd": _known(sums.idle_usd, sums.idle_unpriced_s),
    }


def _known(usd: float, unpriced_s: float) -> float | None:
    """A sum; None where there was something to add, and no price for any of it."""
    return None if unpriced_s and not usd else round(usd, 9)


# Days, weeks and months of the calendar, UTC, and what part of an interval lies in each. Times are epoch seconds.

Period = Literal["day", "week", "month"]

DAY_S = 86400.0
_MONDAYS = 3  # days from the Monday before the epoch, a Thursday, to it


def start_of(period: Period, at: float) -> float:
    """The beginning of the period that ``at`` lies in; a week begins on Monday, as in ISO 8601."""
    day = at // DAY_S
    if period == "month":
        date = datetime.fromtimestamp(day * DAY_S, UTC)
        return date.replace(day=1).timestamp()
    return (day if period == "day" else (day + _MONDAYS) // 7 * 7 - _MONDAYS) * DAY_S


def end_of(period: Period, start: float) -> float:
    """The beginning of the next one."""
    if period == "month":
        return start_of("month", start + timedelta(days=32).total_seconds())
    return start + (7 if period == "week" else 1) * DAY_S


def cut(period: Period, started_at: float, ended_at: float) -> Iterator[tuple[float, float, float]]:
    """``(period's start, from, to)`` for each period that the interval touches; one piece for an empty interval."""
    start = start_of(period, started_at)
    while True:
        end = end_of(period, start)
        until = min(ended_at, end)
        yield start, started_at, until
        if until >= ended_at:
            return
        start = started_at = end


@lru_cache(4096)
def name_of(period: Period, start: float) -> str:
    """``2026-11-25``, ``2026-W48``, ``2026-11``."""
    return datetime.fromtimestamp(start, UTC).strftime({"day": "%Y-%m-%d", "week": "%G-W%V", "month": "%Y-%m"}[period])


# FOCUS 1.2, the FinOps Open Cost and Usage Specification: a row a charge, which is an attempt's time in a month, or
# that of a dev cluster on which there was no run.
#
# Columns, their order, units and nullability: https://focus.finops.org/focus-specification/v1-2/. All mandatory columns
# are there, and those conditional and recommended ones that say something here. The price of a machine is the frozen
# one: list price, contracted price and effective cost are one figure, since what a provider takes off an invoice later
# is not known to spotune. Columns of our own begin with ``x_``, as the specification wants it.

VERSION = "1.2"
FOCUS_COLUMNS = (
    "AvailabilityZone", "BilledCost", "BillingAccountId", "BillingAccountName", "BillingAccountType", "BillingCurrency",
    "BillingPeriodEnd", "BillingPeriodStart", "ChargeCategory", "ChargeClass", "ChargeDescription", "ChargeFrequency",
    "ChargePeriodEnd", "ChargePeriodStart", "ConsumedQuantity", "ConsumedUnit", "ContractedCost",
    "ContractedUnitPrice", "EffectiveCost", "InvoiceIssuerName", "ListCost", "ListUnitPrice", "PricingCategory",
    "PricingQuantity", "PricingUnit", "ProviderName", "PublisherName", "RegionId", "RegionName", "ResourceId",
    "ResourceName", "ResourceType", "ServiceCategory", "ServiceName", "ServiceSubcategory", "SkuId", "SkuMeter",
    "SkuPriceDetails", "SkuPriceId", "SubAccountId", "SubAccountName", "SubAccountType", "Tags", "x_PriceSource",
    "x_Reconciled",
)  # fmt: skip
_PROVIDERS = {
    "aws": "AWS", "gcp": "Google Cloud", "azure": "Microsoft", "lambda": "Lambda", "runpod": "RunPod",
    "nebius": "Nebius", "oci": "Oracle", "kubernetes": "Kubernetes", "slurm": "Slurm", "local": "Local",
}  # fmt: skip
_UNIT = "Hours"


@dataclass(frozen=True)
class Subject:
    """What a charge is for: an attempt, or an idle cluster."""

    resource_id: str
    name: str
    words: str
    team: str
    tags: Mapping[str, Any]


def focus_rows(
    totals: Mapping[str, Any], attempts: Iterable[Mapping[str, Any]], bucket: str
) -> Iterator[dict[str, Any]]:
    """The charges of a run; an attempt without a price, whose cost nobody knows, is none, nor one that took no time.

    Args:
        bucket: stands for the billing account: whose runs lie together are paid for together.
    """
    run_id, tags = totals["run_id"], {name: totals[name] for name in ("run_id", "user", "team", "kind", "config")}
    for attempt in attempts:
        number = attempt["attempt"] if attempt["attempt"] is not None else "lost"
        words = f"{run_id}, attempt {number}"
        yield from _charges(Subject(f"{run_id}/{number}", run_id, words, totals["team"], tags), attempt, bucket)


def idle_rows(idle: Iterable[Mapping[str, Any]], bucket: str) -> Iterator[dict[str, Any]]:
    """The charges of dev clusters while no run was on them: see ``clusters.idle_of``."""
    for piece in idle:
        name, tags = piece["cluster"], {name: piece[name] for name in ("cluster", "user", "team", "kind")}
        yield from _charges(Subject(piece["key"], name, f"{name}, idle", piece["team"], tags), piece, bucket)


def _charges(subject: Subject, paid: Mapping[str, Any], bucket: str) -> Iterator[dict[str, Any]]:
    if paid["cost_usd"] is None:
        return
    ended_at = paid["started_at"] + paid["paid_s"]
    for month, began, until in cut("month", paid["started_at"], ended_at):
        if until > began:  # a charge period is never empty
            yield _charge(subject, paid, bucket, month, began, until)


def _charge(
    subject: Subject, paid: Mapping[str, Any], bucket: str, month: float, began: float, until: float
) -> dict[str, Any]:
    price, market = paid["price_usd_per_hour"], "spot" if paid["use_spot"] else "on-demand"
    usd = paid["cost_usd"] * (until - began) / paid["paid_s"]
    # Hours from dollars: runs that share a cluster have less of its hours than they were on it. A tiny price is rounded
    # to 0 by now.
    hours = usd / price if price else (until - began) / HOUR_S * paid["nodes"]
    cost, quantity = _decimal(usd), _decimal(hours)
    cloud = str(paid["infra"]).partition("/")[0]
    provider = _PROVIDERS.get(cloud, cloud or "Unknown")
    machine = paid["instance_type"] or paid["accelerators"] or cloud or "machine"
    sku = f"{machine}/{paid['accelerators']}" if paid["accelerators"] else machine
    row = {
        "AvailabilityZone": paid["zone"],
        "BilledCost": cost,
        "BillingAccountId": bucket,
        "BillingAccountName": bucket,
        "BillingAccountType": "spotune bucket",
        "BillingCurrency": "USD",
        "BillingPeriodEnd": _instant(end_of("month", month)),
        "BillingPeriodStart": _instant(month),
        "ChargeCategory": "Usage",
        "ChargeDescription": f"{subject.words}: {paid['nodes']:g} x {sku}, {market}",
        "ChargeFrequency": "Usage-Based",
        "ChargePeriodEnd": _instant(math.ceil(until)),
        "ChargePeriodStart": _instant(began),
        "ConsumedQuantity": quantity,
        "ConsumedUnit": _UNIT,
        "ContractedCost": cost,
        "ContractedUnitPrice": _decimal(price),
        "EffectiveCost": cost,
        "InvoiceIssuerName": provider,
        "ListCost": cost,
        "ListUnitPrice": _decimal(price),
        "PricingCategory": "Dynamic" if paid["use_spot"] else "Standard",
        "PricingQuantity": quantity,
        "PricingUnit": _UNIT,
        "ProviderName": provider,
        "PublisherName": provider,
        "RegionId": paid["region"],
        "RegionName": paid["region"],
        "ResourceId": subject.resource_id,
        "ResourceName": subject.name,
        "ResourceType": "Virtual Machine",
        "ServiceCategory": "Compute",
        "ServiceName": f"{provider} machines",
        "ServiceSubcategory": "Virtual Machines",
        "SkuId": sku,
        "SkuMeter": "Machine Hours",
        "SkuPriceDetails": _details(paid),
        "SkuPriceId": f"{sku}/{paid['region'] or '*'}/{market}",
        "SubAccountId": subject.team,
        "SubAccountName": subject.team,
        "SubAccountType": "team" if subject.team else "",
        "Tags": json.dumps(subject.tags),
        "x_PriceSource": paid["price_source"],
        "x_Reconciled": "true" if paid["reconciled"] else "false",
    }
    return {name: row.get(name, "") for name in FOCUS_COLUMNS}


def _details(paid: Mapping[str, Any]) -> str:
    name, count = gpus_of(paid["accelerators"])
    gpus = {"GpuCount": count, "x_GpuType": name} if count else {}
    return json.dumps(({"InstanceType": paid["instance_type"]} if paid["instance_type"] else {}) | gpus)


def _instant(at: float) -> str:
    """ISO 8601, UTC, in whole seconds, as FOCUS has it."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _decimal(amount: float) -> str:
    """Digits without an exponent."""
    return f"{amount:.9f}".rstrip("0").rstrip(".") or "0"
