"""GPU hours paid for and GPU hours in which a kernel ran, from what the machine measured of itself."""

from collections.abc import Sequence
from typing import Any

from spotune.contracts.events import number
from spotune.contracts.money import HOUR_S
from spotune.contracts.shapes import MOST
from spotune.cost.account import Account


def gpus_of(accelerators: str) -> tuple[str, float]:
    """``L4:2`` -> ``("L4", 2.0)``; a machine without one is ``cpu`` and has none."""
    name, _, count = accelerators.partition(":")
    try:
        number = float(count or 1)
    except ValueError:
        number = 1.0
    return name or "cpu", (number if 0 < number <= MOST else 1.0) if name else 0.0


def gpu_figures(accounts: Sequence[Account]) -> dict[str, Any]:
    """Of all machines of a run.

    ``gpu_utilization``: mean over the samples, each attempt by its GPU hours; of attempts without one nothing is
    known, so that they are not in it. ``gpu_busy_hours``: of the attempts that were measured. ``gpu_memory_gib``: the
    most that was in use, of ``gpu_memory_total_gib``. All None without a sample.
    """
    hours = measured = busy = 0.0
    fullest: tuple[float, float] | None = None
    for account in accounts:
        paid = account.paid_s / HOUR_S * account.nodes * gpus_of(account.place.accelerators)[1]
        hours += paid
        samples = [event for event in account.events if event["event"] == "gpu"]
        shares = [share for event in samples if (share := number(event.get("busy"))) is not None and 0 <= share <= 1]
        if shares:
            measured += paid
            busy += paid * sum(shares) / len(shares)
        for event in samples:
            used, total = number(event.get("memory_gib")), number(event.get("memory_total_gib"))
            if used is not None and total is not None:
                fullest = max(fullest or (used, total), (used, total))
    return {
        "gpu_hours": hours,
        "gpu_utilization": busy / measured if measured else None,
        "gpu_busy_hours": busy if measured else None,
        "gpu_memory_gib": fullest and fullest[0],
        "gpu_memory_total_gib": fullest and fullest[1],
    }
