"""Turns reports into flat rows: CSV, sums by user, team, place, GPU or time, and FOCUS charges. Pure."""

import csv
import io
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, Literal, get_args

from spotune.core.money import HOUR_S, cost_of
from spotune.cost.account import gpus_of
from spotune.cost.machines import PAID_PHASES

Row = Mapping[str, Any]
KeyedRow = tuple[Any, Row]  # a run's key, and its totals or one of its attempts

# Columns of an attempt in the CSV, of an attempt in the index, and of a run in both.
ATTEMPT = (
    "attempt", "infra", "region", "zone", "instance_type", "accelerators", "nodes", "use_spot",
    "price_usd_per_hour", "price_source", "started_at", "ended_at", "paid_s", "cost_usd", "end_reason",
    "first_step", "last_step",
)  # fmt: skip
INDEXED = (*ATTEMPT, "reconciled", "cluster", "gpu_share", "useful_s")
ATTEMPT_ROW = ("run_id", *ATTEMPT, *(f"{phase}_s" for phase in PAID_PHASES))
RUN = (
    "run_id", "state", "user", "team", "kind", "config", "submitted_at", "started_at", "ended_at", "attempts",
    "paid_s", "useful_s", "cost_usd", "on_demand_usd", "saved_usd", "goodput", "useful_steps", "replayed_steps",
    "tokens", "unreconciled_s", "unpriced_s", "budget_usd", "preemptions", "preemptions_usd",
    "usd_per_million_tokens", "gpu_hours", "gpu_busy_hours", "gpu_utilization",
)  # fmt: skip


def attempt_rows(report: Row, columns: Sequence[str] = ATTEMPT_ROW) -> list[dict[str, Any]]:
    """Returns a row for each attempt, the seconds of its phases as columns."""
    rows = [{"run_id": report["run_id"], **attempt, **attempt["phases"]} for attempt in report["attempts"]]
    return [{name: row[name] for name in columns} for row in rows]


def indexed_attempts(report: Row) -> list[dict[str, Any]]:
    """Returns a row for each attempt, as the index keeps it."""
    return attempt_rows(report, INDEXED)


def run_row(report: Row) -> dict[str, Any]:
    """Returns a run's totals as one row."""
    flat = {
        **report,
        "attempts": len(report["attempts"]),
        "useful_s": report["phases"]["useful_s"],
        "preemptions": len(report["preemptions"]),
        "preemptions_usd": cost_of(report["preemptions"]),
    }
    return {name: flat[name] for name in RUN}


def as_csv(rows: Sequence[Row], columns: Sequence[str] = ()) -> str:
    """Formats rows as RFC 4180 with a header line; without rows the header alone, or nothing without columns.

    Users' text may start with a sign that a spreadsheet takes for a formula: such a cell gets a quote in front.
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


# Chargeback: attempts summed by user, place, GPU or time. How the figures are made:
#
# on_demand_usd, saved_usd  belong to a run as a whole, so only groups by user, team and kind have them. Both are summed
#                 over the runs that have them (compared_runs), so that saved_usd compares like with like
# cost_usd        None if no part of it is known; seconds without a price are in unpriced_s
# goodput         not for days and weeks, which get of each attempt the seconds that lie in them
# idle_usd        what dev clusters cost while no run was on them; it is in no other figure. It belongs to the owner,
#                 and has a place, a GPU and a time as an attempt has

By = Literal["user", "team", "infra", "gpu", "day", "week", "kind"]
BY: tuple[By, ...] = get_args(By)
OF_TIME = ("day", "week")
# The columns of an attempt that ``group`` uses.
COLUMNS = ("attempt", "infra", "accelerators", "nodes", "started_at", "paid_s", "cost_usd", "useful_s", "reconciled")


@dataclass
class Sums:
    """Adds up a group."""

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

    def add(self, key: Any, attempt: Row, share: float) -> None:
        """Adds a share, 0 to 1, of an attempt."""
        seconds = attempt["paid_s"] * share
        self.runs.add(key)
        self.attempts.add((key, attempt["attempt"], attempt["started_at"]))
        self.paid_s += seconds
        self.gpu_s += seconds * attempt["nodes"] * gpus_of(attempt["accelerators"])[1]
        self.useful_s += attempt["useful_s"] * share
        self.cost_usd += (attempt["cost_usd"] or 0.0) * share
        self.unpriced_s += seconds if attempt["cost_usd"] is None else 0.0
        self.unreconciled_s += 0.0 if attempt["reconciled"] else seconds


def group(
    by: By, runs: Iterable[KeyedRow], attempts: Iterable[KeyedRow], idle: Iterable[Row] = ()
) -> list[dict[str, Any]]:
    """Returns a row for each group, the dearest first; days and weeks in order of time.

    Every paid second of the attempts is in one group. ``idle``: rows of ``dev_clusters.idle_of``.
    """
    totals = dict(runs)
    groups: defaultdict[str, Sums] = defaultdict(Sums)
    for key, attempt in attempts:
        for name, share in _parts(by, totals[key], attempt):
            groups[name].add(key, attempt, share)
    if by in ("user", "team", "kind"):
        for key, total in totals.items():
            sums = groups[_of_run(by, total)]
            sums.runs.add(key)
            if total["saved_usd"] is not None:
                sums.on_demand_usd += total["on_demand_usd"]
                sums.saved_usd += total["saved_usd"]
                sums.compared += 1
    for piece in idle:
        for name, share in _parts(by, piece, piece):
            groups[name].idle_usd += (piece["cost_usd"] or 0.0) * share
            groups[name].idle_unpriced_s += piece["paid_s"] * share if piece["cost_usd"] is None else 0.0
    rows = [_row(by, name, sums) for name, sums in groups.items()]
    return sorted(rows, key=lambda row: row[by] if by in OF_TIME else (-spent_usd(row), row[by]))


def spent_usd(row: Row) -> float:
    """Returns what a group has cost as far as it is known, with its idle dev clusters."""
    return (row["cost_usd"] or 0.0) + (row["idle_usd"] or 0.0)


def _parts(by: By, total: Row, attempt: Row) -> Iterator[tuple[str, float]]:
    """Yields the groups that an attempt belongs to, and its share in each."""
    match by:
        case "day" | "week":
            paid_s = attempt["paid_s"]
            for start, began, until in pieces_of(by, attempt["started_at"], attempt["started_at"] + paid_s):
                yield name_of(by, start), (until - began) / paid_s if paid_s else 1.0
        case "infra":
            yield attempt["infra"] or "(not known)", 1.0
        case "gpu":
            yield gpus_of(attempt["accelerators"])[0], 1.0
        case _:
            yield _of_run(by, total), 1.0


def _of_run(by: By, total: Row) -> str:
    return total[by] or ("(no team)" if by == "team" else "(nobody)")


def columns(by: By) -> list[str]:
    return list(_row(by, "", Sums()))


def _row(by: By, name: str, sums: Sums) -> dict[str, Any]:
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
        "goodput": sums.useful_s / sums.paid_s if by not in OF_TIME and sums.paid_s > 0 else None,
        "unpriced_s": round(sums.unpriced_s, 3),
        "unreconciled_s": round(sums.unreconciled_s, 3),
        "idle_usd": _known(sums.idle_usd, sums.idle_unpriced_s),
    }


def _known(usd: float, unpriced_s: float) -> float | None:
    """Returns the sum, None if there was something to add and no price for any of it."""
    return None if unpriced_s and not usd else round(usd, 9)


# Days, weeks and months of the calendar, UTC. Times are epoch seconds.

Period = Literal["day", "week", "month"]

DAY_S = 86400.0
_MONDAYS = 3  # days from the Monday before the epoch, a Thursday, to the epoch


def start_of(period: Period, at: float) -> float:
    """Returns the start of the period that contains ``at``; a week begins on Monday, as in ISO 8601."""
    day = at // DAY_S
    if period == "month":
        return datetime.fromtimestamp(day * DAY_S, UTC).replace(day=1).timestamp()
    return (day if period == "day" else (day + _MONDAYS) // 7 * 7 - _MONDAYS) * DAY_S


def end_of(period: Period, start: float) -> float:
    """Returns the start of the next period."""
    if period == "month":
        return start_of("month", start + timedelta(days=32).total_seconds())
    return start + (7 if period == "week" else 1) * DAY_S


def pieces_of(period: Period, started_at: float, ended_at: float) -> Iterator[tuple[float, float, float]]:
    """Yields ``(period's start, from, to)`` for each period in the interval; one piece for an empty interval."""
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
    """Returns ``2026-11-25``, ``2026-W48`` or ``2026-11``."""
    return datetime.fromtimestamp(start, UTC).strftime({"day": "%Y-%m-%d", "week": "%G-W%V", "month": "%Y-%m"}[period])


# FOCUS 1.2, the FinOps Open Cost and Usage Specification: a row a charge. A charge is the time of an attempt, or of an
# idle dev cluster, in one month.
#
# Columns, their order, units and nullability: https://focus.finops.org/focus-specification/v1-2/. All mandatory columns
# are there, and the conditional and recommended ones that have a meaning here. The price of a machine is the frozen
# one: list price, contracted price and effective cost are one figure, since spotune does not know what a provider takes
# off an invoice later. Our own columns begin with ``x_``, as the specification wants it.

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


def focus_rows(totals: Row, attempts: Iterable[Row], bucket: str) -> Iterator[dict[str, Any]]:
    """Yields the charges of a run. An attempt without a price, or that took no time, is no charge.

    Args:
        bucket: stands for the billing account: runs in one bucket are paid for together.
    """
    run_id, tags = totals["run_id"], {name: totals[name] for name in ("run_id", "user", "team", "kind", "config")}
    for attempt in attempts:
        number = attempt["attempt"] if attempt["attempt"] is not None else "lost"
        yield from _charges(attempt, bucket, f"{run_id}/{number}", run_id, f"{run_id}, attempt {number}", tags)


def idle_rows(idle: Iterable[Row], bucket: str) -> Iterator[dict[str, Any]]:
    """Yields the charges of idle dev clusters; ``idle``: rows of ``dev_clusters.idle_of``."""
    for piece in idle:
        name, tags = piece["cluster"], {name: piece[name] for name in ("cluster", "user", "team", "kind")}
        yield from _charges(piece, bucket, piece["key"], name, f"{name}, idle", tags)


def _charges(paid: Row, bucket: str, resource: str, name: str, what: str, tags: Row) -> Iterator[dict[str, Any]]:
    if paid["cost_usd"] is None:
        return
    row = _resource(paid, bucket, resource, name, what, tags)
    price = paid["price_usd_per_hour"]
    for month, began, until in pieces_of("month", paid["started_at"], paid["started_at"] + paid["paid_s"]):
        if until <= began:  # a charge period is never empty
            continue
        usd = paid["cost_usd"] * (until - began) / paid["paid_s"]
        # Hours from dollars: runs that share a cluster have less of its hours than they were on it. A tiny price is
        # rounded to 0 by now.
        hours = usd / price if price else (until - began) / HOUR_S * paid["nodes"]
        row |= {
            "BillingPeriodEnd": _instant(end_of("month", month)),
            "BillingPeriodStart": _instant(month),
            "ChargePeriodEnd": _instant(math.ceil(until)),
            "ChargePeriodStart": _instant(began),
            **dict.fromkeys(("BilledCost", "ContractedCost", "EffectiveCost", "ListCost"), _decimal(usd)),
            **dict.fromkeys(("ConsumedQuantity", "PricingQuantity"), _decimal(hours)),
            **dict.fromkeys(("ContractedUnitPrice", "ListUnitPrice"), _decimal(price)),
        }
        yield {name: row.get(name, "") for name in FOCUS_COLUMNS}


def _resource(paid: Row, bucket: str, resource: str, name: str, what: str, tags: Row) -> dict[str, Any]:
    """Returns the columns that do not depend on the month."""
    market = "spot" if paid["use_spot"] else "on-demand"
    cloud = str(paid["infra"]).partition("/")[0]
    provider = _PROVIDERS.get(cloud, cloud or "Unknown")
    machine = paid["instance_type"] or paid["accelerators"] or cloud or "machine"
    sku = f"{machine}/{paid['accelerators']}" if paid["accelerators"] else machine
    gpu, count = gpus_of(paid["accelerators"])
    details = {"InstanceType": paid["instance_type"]} if paid["instance_type"] else {}
    return {
        "AvailabilityZone": paid["zone"],
        "BillingAccountType": "spotune bucket",
        "BillingCurrency": "USD",
        "ChargeCategory": "Usage",
        "ChargeDescription": f"{what}: {paid['nodes']:g} x {sku}, {market}",
        "ChargeFrequency": "Usage-Based",
        "PricingCategory": "Dynamic" if paid["use_spot"] else "Standard",
        "ResourceId": resource,
        "ResourceName": name,
        "ResourceType": "Virtual Machine",
        "ServiceCategory": "Compute",
        "ServiceName": f"{provider} machines",
        "ServiceSubcategory": "Virtual Machines",
        "SkuId": sku,
        "SkuMeter": "Machine Hours",
        "SkuPriceDetails": json.dumps(details | ({"GpuCount": count, "x_GpuType": gpu} if count else {})),
        "SkuPriceId": f"{sku}/{paid['region'] or '*'}/{market}",
        "SubAccountType": "team" if tags["team"] else "",
        "Tags": json.dumps(tags),
        "x_PriceSource": paid["price_source"],
        "x_Reconciled": "true" if paid["reconciled"] else "false",
        **dict.fromkeys(("BillingAccountId", "BillingAccountName"), bucket),
        **dict.fromkeys(("ConsumedUnit", "PricingUnit"), "Hours"),
        **dict.fromkeys(("InvoiceIssuerName", "ProviderName", "PublisherName"), provider),
        **dict.fromkeys(("RegionId", "RegionName"), paid["region"]),
        **dict.fromkeys(("SubAccountId", "SubAccountName"), tags["team"]),
    }


def _instant(at: float) -> str:
    """Formats a time as FOCUS has it: ISO 8601, UTC, whole seconds."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _decimal(amount: float) -> str:
    """Formats a number without an exponent."""
    return f"{amount:.9f}".rstrip("0").rstrip(".") or "0"
