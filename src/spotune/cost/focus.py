"""FOCUS 1.2, the FinOps Open Cost and Usage Specification: a row a charge, which is an attempt's time in a month.

Columns, their order, units and nullability: https://focus.finops.org/focus-specification/v1-2/. All mandatory columns
are there, and those conditional and recommended ones that say something here. The price of a machine is the frozen
one: list price, contracted price and effective cost are one figure, since what a provider takes off an invoice later
is not known to spotune. Columns of our own begin with ``x_``, as the specification wants it.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from spotune.cost.gpus import gpus_of
from spotune.cost.periods import cut, end_of

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


def focus_rows(
    totals: Mapping[str, Any], attempts: Iterable[Mapping[str, Any]], bucket: str
) -> Iterator[dict[str, Any]]:
    """The charges of a run; an attempt without a price, whose cost nobody knows, is none.

    Args:
        bucket: stands for the billing account: whose runs lie together are paid for together.
    """
    for attempt in attempts:
        if attempt["cost_usd"] is None:
            continue
        ended_at = attempt["started_at"] + attempt["paid_s"]
        for month, began, until in cut("month", attempt["started_at"], ended_at):
            yield _charge(totals, attempt, bucket, month, began, until)


def _charge(
    totals: Mapping[str, Any], attempt: Mapping[str, Any], bucket: str, month: float, began: float, until: float
) -> dict[str, Any]:
    hours = (until - began) / 3600 * attempt["nodes"]
    price, market = attempt["price_usd_per_hour"], "spot" if attempt["use_spot"] else "on-demand"
    cost, quantity = _decimal(hours * price), _decimal(hours)
    cloud = str(attempt["infra"]).partition("/")[0]
    provider = _PROVIDERS.get(cloud, cloud or "Unknown")
    machine = attempt["instance_type"] or attempt["accelerators"] or cloud or "machine"
    sku = f"{machine}/{attempt['accelerators']}" if attempt["accelerators"] else machine
    number = attempt["attempt"] if attempt["attempt"] is not None else "lost"
    row = {
        "AvailabilityZone": attempt["zone"],
        "BilledCost": cost,
        "BillingAccountId": bucket,
        "BillingAccountName": bucket,
        "BillingAccountType": "spotune bucket",
        "BillingCurrency": "USD",
        "BillingPeriodEnd": _instant(end_of("month", month)),
        "BillingPeriodStart": _instant(month),
        "ChargeCategory": "Usage",
        "ChargeDescription": f"{totals['run_id']}, attempt {number}: {attempt['nodes']} x {sku}, {market}",
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
        "PricingCategory": "Dynamic" if attempt["use_spot"] else "Standard",
        "PricingQuantity": quantity,
        "PricingUnit": _UNIT,
        "ProviderName": provider,
        "PublisherName": provider,
        "RegionId": attempt["region"],
        "RegionName": attempt["region"],
        "ResourceId": f"{totals['run_id']}/{number}",
        "ResourceName": totals["run_id"],
        "ResourceType": "Virtual Machine",
        "ServiceCategory": "Compute",
        "ServiceName": f"{provider} machines",
        "ServiceSubcategory": "Virtual Machines",
        "SkuId": sku,
        "SkuMeter": "Machine Hours",
        "SkuPriceDetails": _details(attempt),
        "SkuPriceId": f"{sku}/{attempt['region'] or '*'}/{market}",
        "SubAccountId": totals["team"],
        "SubAccountName": totals["team"],
        "SubAccountType": "team" if totals["team"] else "",
        "Tags": json.dumps({name: totals[name] for name in ("run_id", "user", "team", "kind", "config")}),
        "x_PriceSource": attempt["price_source"],
        "x_Reconciled": "true" if attempt["reconciled"] else "false",
    }
    return {name: row.get(name, "") for name in COLUMNS}


def _details(attempt: Mapping[str, Any]) -> str:
    name, count = gpus_of(attempt["accelerators"])
    gpus = {"GpuCount": count, "x_GpuType": name} if count else {}
    return json.dumps(({"InstanceType": attempt["instance_type"]} if attempt["instance_type"] else {}) | gpus)


def _instant(at: float) -> str:
    """ISO 8601, UTC, in whole seconds, as FOCUS has it."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _decimal(amount: float) -> str:
    """Digits without an exponent."""
    return f"{amount:.9f}".rstrip("0").rstrip(".") or "0"
