"""FOCUS 1.2, the FinOps Open Cost and Usage Specification: a row a charge, which is an attempt's time in a month, or
that of a dev cluster on which there was no run.

Columns, their order, units and nullability: https://focus.finops.org/focus-specification/v1-2/. All mandatory columns
are there, and those conditional and recommended ones that say something here. The price of a machine is the frozen
one: list price, contracted price and effective cost are one figure, since what a provider takes off an invoice later
is not known to spotune. Columns of our own begin with ``x_``, as the specification wants it.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from spotune.core.money import HOUR_S
from spotune.cost.account import gpus_of
from spotune.cost.rows import cut, end_of

VERSION = "1.2"
COLUMNS = (
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
    return {name: row.get(name, "") for name in COLUMNS}


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
