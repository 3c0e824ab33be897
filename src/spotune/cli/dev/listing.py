"""The table of ``dev ls``."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from spotune.cli.render import duration
from spotune.contracts.columns import columns

if TYPE_CHECKING:
    from spotune.launch.skypilot.listing import Listed


def clusters_text(listed: "Sequence[Listed]", now: float) -> str:
    rows = [
        [
            each.cluster.name,
            each.cluster.status,
            each.cluster.infra,
            each.cluster.gpus or "-",
            duration(now - each.cluster.launched_at),
            _money(each.cluster.price_usd_per_hour, 3),
            _money(each.cluster.spent_usd, 2),
            "-" if each.last_active_at is None else duration(now - each.last_active_at),
            _stops(each, now),
            each.why,
        ]
        for each in listed
    ]
    return columns(["CLUSTER", "STATUS", "INFRA", "GPUS", "AGE", "$/HOUR", "SPENT $", "IDLE", "STOPS", "WHY"], rows)


def _money(amount: float | None, digits: int) -> str:
    return "?" if amount is None else f"{amount:.{digits}f}"


def _stops(each: "Listed", now: float) -> str:
    if each.cluster.status != "UP":
        return "-"
    verb = "down" if each.cluster.to_down else "stop"
    if each.stops_at is not None:
        return f"{verb} in {duration(each.stops_at - now)}"
    if each.idle_minutes is None:
        return "never"
    return f"{verb} {each.idle_minutes:g}m after work"
