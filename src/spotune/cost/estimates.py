"""What a bucket costs beside the machines: estimates from the bytes that went to and fro, at public list prices.

No row of an engine has them. Whether a byte crossed a region, or left a cloud, is not known: both are said, for all
bytes. List prices as of 2026-11: https://aws.amazon.com/s3/pricing/, https://cloud.google.com/storage/pricing (the
first tier, US regions). A bucket in a folder costs nothing that is known here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spotune.contracts.events import number
from spotune.contracts.keys import commit_of
from spotune.cost.eventlog import step_of
from spotune.cost.evidence import Evidence

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
