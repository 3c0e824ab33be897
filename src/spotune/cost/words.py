"""Figures and phases as people read them."""

from collections.abc import Iterable, Mapping
from typing import Any

from spotune.core import money

# Phase -> what it is called, and what it is, in the order in which it is shown.
PHASES: dict[str, tuple[str, str]] = {
    "useful": ("training", "steps that count"),
    "data_wait": ("data wait", "training waited for its next batch"),
    "eval": ("evaluation", "on held-out data"),
    "save_stall": ("saving", "training stood still for a checkpoint"),
    "replayed": ("replayed", "steps that an earlier attempt had done already"),
    "stalled": ("stalled", "ranks hung, from their last sign of life until the watchdog ended the attempt"),
    "restore": ("restore", "fetching the checkpoint"),
    "load": ("loading", "imports, model, tokenizing"),
    "setup": ("setup", "the task's own setup"),
    "provision": ("provision", "from the machine's start to our first line on it"),
    "idle": ("idle", "held, with nothing to do"),
    "teardown": ("leaving", "last upload, result, exit"),
    "unknown": ("unknown", "paid, but no record says what for"),
}
NONE = "–"


def usd(amount: float | None) -> str:
    return NONE if amount is None else money.usd(amount)


def percent(share: float | None) -> str:
    if share is None:
        return NONE
    return f"{share * 100:.0f} %" if share >= 0.0995 or share <= 0 else f"{share * 100:.1f} %"


def duration(seconds: float | None) -> str:
    """``0.4 s``, ``45 s``, ``12m 3s``, ``5h 2m``, ``3d 4h``."""
    if seconds is None:
        return NONE
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    left, parts = round(seconds), []
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        amount, left = divmod(left, size)
        if amount:
            parts.append(f"{amount}{unit}")
    return " ".join(parts[:2])


def is_seen(seconds: float) -> bool:
    """Returns whether a duration is more than the ``0.0 s`` that it would be shown as."""
    return seconds >= 0.05


def count(number: int | None) -> str:
    return NONE if number is None else f"{number:,}"


def machine(attempt: Mapping[str, Any]) -> str:
    """What ran and where: ``2 x g6.xlarge L4:1, aws us-east-1a``."""
    kind = " ".join(part for part in (attempt["instance_type"], attempt["accelerators"]) if part)
    place = [attempt["infra"], attempt["zone"] or attempt["region"]]
    where = " ".join(part for part in place if part and part != kind)
    nodes = f"{attempt['nodes']} × " if attempt["nodes"] > 1 else ""
    return f"{nodes}{kind}, {where}" if kind and where else kind or where or NONE


def market(attempt: Mapping[str, Any]) -> str:
    return {True: "spot", False: "on-demand", None: NONE}[attempt["use_spot"]]


def steps(attempt: Mapping[str, Any]) -> str:
    first, last = attempt["first_step"], attempt["last_step"]
    return NONE if last is None else f"{first or '?'}–{last}"


def use_of(source: Mapping[str, Any]) -> str:
    """What a source's rows are used for."""
    return f"{source['set']}{', streamed' if source['rows'] is None else ''}"


def end(attempt: Mapping[str, Any]) -> str:
    return str(attempt["end_reason"] or "running")


def saved(report: Mapping[str, Any]) -> str:
    """``saved $0.12 (31 %)`` in words, a loss said as one."""
    amount, base = report["saved_usd"], report["on_demand_usd"]
    if amount is None:
        return NONE
    share = f" ({percent(abs(amount) / base)})" if base else ""
    return f"{usd(abs(amount))}{share} {'less' if amount >= 0 else 'more'} than on demand"


def preemptions(report: Mapping[str, Any]) -> list[str]:
    """What all of them cost together, in a line; none for none."""
    lost = report["preemptions"]
    if not lost:
        return []
    cost, total = cost_of(lost), report["cost_usd"]
    again_s = sum(one["replayed_s"] for one in lost)
    share = f" ({percent(cost / total)})" if total and cost is not None else ""
    what = "1 lost machine" if len(lost) == 1 else f"{len(lost)} lost machines"
    restart_s = sum(one["paid_s"] for one in lost) - again_s
    return [f"{what} cost {usd(cost)}{share}: restart {duration(restart_s)}, done again {duration(again_s)}"]


def cost_of(rows: Iterable[Mapping[str, Any]]) -> float | None:
    """Their sum; None where one of them is not known."""
    costs = [row["cost_usd"] for row in rows]
    return None if None in costs else sum(costs)


def known(amounts: Iterable[float | None]) -> float | None:
    """The sum of those that are known; None where none is."""
    found = list(amounts)
    told = [amount for amount in found if amount is not None]
    return sum(told) if told or not found else None


def gpus(report: Mapping[str, Any]) -> list[str]:
    """How busy and how full the GPUs were, in a line; none where that was not measured."""
    if report["gpu_utilization"] is None:
        return []
    memory = ""
    if report["gpu_memory_gib"] is not None:
        memory = f", at most {report['gpu_memory_gib']:.1f} of {report['gpu_memory_total_gib']:.0f} GiB in use"
    hours = f"{report['gpu_busy_hours']:.2f} of {report['gpu_hours']:.2f} paid GPU hours"
    return [f"GPUs busy {percent(report['gpu_utilization'])}, {hours}{memory}"]


def stalls(report: Mapping[str, Any]) -> list[str]:
    """What the time without a sign of life cost, in a line; none for none."""
    hung = [attempt for attempt in report["attempts"] if attempt["phases"]["stalled_s"] > 0]
    if not hung:
        return []
    seconds = [attempt["phases"]["stalled_s"] for attempt in hung]
    hourly = [attempt["price_usd_per_hour"] for attempt in hung]
    cost = None
    if None not in hourly:
        parts = zip(seconds, hourly, hung, strict=True)
        cost = sum(paid_s / money.HOUR_S * price * attempt["nodes"] for paid_s, price, attempt in parts)
    what = "1 stalled attempt" if len(hung) == 1 else f"{len(hung)} stalled attempts"
    return [f"{what} cost {usd(cost)}: {duration(sum(seconds))} without a sign of life"]


def losses(report: Mapping[str, Any]) -> list[str]:
    """Where the loss was NaN or infinite: a line for each attempt; none where it was not."""
    found = []
    for attempt in report["attempts"]:
        if points := attempt.get("losses_not_finite"):
            (step, loss), last = points[0], points[-1][0]
            until = f" to {last}" if last != step else ""
            found.append(f"Attempt {attempt['attempt']}: the loss is not finite ({loss}) at step {step}{until}.")
    return found


def estimated(report: Mapping[str, Any]) -> list[str]:
    """What the bucket adds, as far as it can be guessed."""
    found = report.get("estimates")
    if not found or found["storage_usd_per_month"] is None:
        return []
    moved = found["sent_bytes"] + found["fetched_bytes"]
    return [
        f"Not in the cost, estimated: {size(found['stored_bytes'])} in the bucket are"
        f" {usd(found['storage_usd_per_month'])} a month; {size(moved)} sent and fetched are free in one region,"
        f" {usd(found['other_region_usd'])} to another, {usd(found['other_cloud_usd'])} to another cloud."
    ]


def size(number: float) -> str:
    """``0.4 GB``, ``12 MB``: powers of 1000."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= scale:
            return f"{number / scale:.1f} {unit}"
    return f"{number:.0f} B"
