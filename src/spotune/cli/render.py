"""Tables and words for people."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from spotune.core.io import columns, cut, plain

if TYPE_CHECKING:
    from spotune.core.records import PriceRow
    from spotune.launch.engine import JobStatus
    from spotune.launch.origins import Origin
    from spotune.launch.plan import Plan

MAX_OFFERS = 10


def plan_text(plan: "Plan", now: float) -> str:
    """A plan as SkyPilot shows one: what would run, what it takes from elsewhere, and the priced offers."""
    record = plan.record
    shown = shown_offers(plan)
    offers = [
        [
            place_of(offer),
            offer.instance_type or "-",
            offer.accelerators or "-",
            "spot" if offer.use_spot else "on-demand",
            f"{offer.price_usd_per_hour:.3f}" if offer.price_usd_per_hour else "?",
            "✔" if offer == plan.chosen else "",
        ]
        for offer in shown
    ]
    facts = [
        ("run", plan.run_id),
        ("config", f"{record.config_path} (profile {record.profile or 'prod if it has one'})"),
        ("model", str(record.config["model_name_or_path"])),
        ("data", f"{len(record.data_files)} file(s), {record.data_sha256[:12]}"),
        ("task", str(plan.task_path)),
        ("bucket", plan.bucket),
        ("priority", str(record.priority)),
    ]
    if record.budget_usd is not None:
        facts.append(("budget", budget_text(plan)))
    if plan.submission.preemptions:
        facts.append(("preemptions", f"{len(plan.submission.preemptions)} planned"))
    facts += [(origin.kind, origin_text(origin, now)) for origin in plan.takes]
    facts += plan.code.lines()
    facts += [("note", note) for note in plan.notes]
    text = fact_lines(facts)
    priced = columns(["INFRA", "INSTANCE", "ACCELERATORS", "KIND", "$/HOUR", "CHOSEN"], offers)
    more = f"\n… and {len(plan.offers) - len(shown)} more" if len(plan.offers) > len(shown) else ""
    return f"{text}\n\n{priced}{more}"


def fact_lines(facts: "Iterable[tuple[str, str]]") -> str:
    return "\n".join(f"{name:<12}{plain(value)}" for name, value in facts)


def origin_text(origin: "Origin", now: float) -> str:
    """``run-b by eva: its config``, ``3 by eva, 2h 5m ago: learning_rate: 0.0001 -> 0.001``."""
    name, colon, rest = origin.what.partition(": ")
    if origin.kind not in ("takes from", "goes to", "revision") or not colon:
        return origin.what
    by = f" by {origin.by}" if origin.by else ""
    age = f", {duration(now - origin.at)} ago" if origin.at else ""
    return f"{name}{by}{age}: {rest}"


def budget_text(plan: "Plan") -> str:
    """``$20.00, 64h 31m at $0.31 an hour``: how far it goes where the run would start."""
    from spotune.core.money import usd

    budget_usd = plan.record.budget_usd or 0.0
    nodes = int(plan.submission.task.get("num_nodes") or 1)
    hourly = nodes * plan.chosen.price_usd_per_hour if plan.chosen else 0.0
    lasts = f", {duration(budget_usd / hourly * 3600)} at {usd(hourly)} an hour" if hourly else ""
    return f"{usd(budget_usd)}{lasts}"


def shown_offers(plan: "Plan") -> "list[PriceRow]":
    """The cheapest ones, and the one that would be taken."""
    shown = list(plan.offers[:MAX_OFFERS])
    return shown if plan.chosen is None or plan.chosen in shown else [*shown[:-1], plan.chosen]


def place_of(offer: "PriceRow") -> str:
    """``aws/us-east-1/us-east-1a``, as far as the row says."""
    places = [place for place in (offer.region, offer.zone) if place not in ("", "*")]
    return offer.infra if offer.infra == "local" else "/".join([offer.infra, *places])


def queue_text(runs: "Sequence[JobStatus]", now: float, reason_width: int | None = None) -> str:
    """The queue for people; reasons are cut to a width where lines would wrap."""
    header = ["RUN", "STATE", "PRIO", "SUBMITTED", "RUNS FOR", "ATTEMPT", "STEP", "INFRA", "USER", "REASON"]
    rows = [
        [
            run.run_id,
            run.state,
            str(run.priority),
            f"{duration(now - run.submitted_at)} ago",
            duration((run.ended_at or now) - run.started_at) if run.started_at else "-",
            str(run.attempt or "-"),
            progress(run),
            run.infra,
            run.user,
            run.reason if reason_width is None else cut(plain(run.reason), reason_width),
        ]
        for run in runs
    ]
    return columns(header, rows)


def progress(run: "JobStatus") -> str:
    if run.step is None:
        return "-"
    return f"{run.step}/{run.max_steps}" if run.max_steps else str(run.step)


def duration(seconds: float) -> str:
    """``45s``, ``12m 3s``, ``5h 2m``, ``3d 4h``: the two largest units."""
    left = max(0, int(seconds))
    parts: list[str] = []
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        amount, left = divmod(left, size)
        if amount or (unit == "s" and not parts):
            parts.append(f"{amount}{unit}")
    return " ".join(parts[:2])
