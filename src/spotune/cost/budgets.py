"""Budgets as the launcher sees them: may this run go on, and what may still be spent."""

from collections.abc import Mapping
from typing import Any

from spotune.contracts.errors import InputError
from spotune.contracts.money import usd


def check_wall(report: Mapping[str, Any], wanted_usd: float | None) -> None:
    """Raises InputError for a run that would only pause again: its wall, or the wanted one, is reached already."""
    limit_usd = report["budget_usd"] if wanted_usd is None else wanted_usd
    spent_usd = report["cost_usd"]
    if limit_usd is None or spent_usd is None or spent_usd < limit_usd:
        return
    remedy = f"spotune resume {report['run_id']} --budget, above what is spent"
    raise InputError(report["run_id"], f"has cost {usd(spent_usd)} of {usd(limit_usd)}", key="budget", remedy=remedy)
