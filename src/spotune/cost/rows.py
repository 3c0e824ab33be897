"""A report as flat rows: csv of a run's attempts, and one row a run where many are listed."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from spotune.cost.phases import PAID_PHASES
from spotune.cost.words import cost_of

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
