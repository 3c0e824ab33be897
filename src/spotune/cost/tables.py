"""Figures and phases as people read them."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from spotune.core import money
from spotune.core.io import columns, cut, plain
from spotune.cost.export import spent_usd
from spotune.cost.index import COUNTS

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


def machine(attempt: Mapping[str, Any]) -> str:
    """What ran and where: ``2 x g6.xlarge L4:1, aws us-east-1a``."""
    kind = " ".join(part for part in (attempt["instance_type"], attempt["accelerators"]) if part)
    place = [attempt["infra"], attempt["zone"] or attempt["region"]]
    where = " ".join(part for part in place if part and part != kind)
    nodes = f"{attempt['nodes']} × " if attempt["nodes"] > 1 else ""
    return f"{nodes}{kind}, {where}" if kind and where else kind or where or money.NONE


def market(attempt: Mapping[str, Any]) -> str:
    return {True: "spot", False: "on-demand", None: money.NONE}[attempt["use_spot"]]


def steps(attempt: Mapping[str, Any]) -> str:
    first, last = attempt["first_step"], attempt["last_step"]
    return money.NONE if last is None else f"{first or '?'}–{last}"


def use_of(source: Mapping[str, Any]) -> str:
    """What a source's rows are used for."""
    return f"{source['set']}{', streamed' if source['rows'] is None else ''}"


def end(attempt: Mapping[str, Any]) -> str:
    return str(attempt["end_reason"] or "running")


def saved(report: Mapping[str, Any]) -> str:
    """``saved $0.12 (31 %)`` in words, a loss said as one."""
    amount, base = report["saved_usd"], report["on_demand_usd"]
    if amount is None:
        return money.NONE
    share = f" ({money.percent(abs(amount) / base)})" if base else ""
    return f"{money.usd(abs(amount))}{share} {'less' if amount >= 0 else 'more'} than on demand"


def preemptions(report: Mapping[str, Any]) -> list[str]:
    """What all of them cost together, in a line; none for none."""
    lost = report["preemptions"]
    if not lost:
        return []
    cost, total = money.cost_of(lost), report["cost_usd"]
    again_s = sum(one["replayed_s"] for one in lost)
    share = f" ({money.percent(cost / total)})" if total and cost is not None else ""
    what = "1 lost machine" if len(lost) == 1 else f"{len(lost)} lost machines"
    restart = money.duration(sum(one["paid_s"] for one in lost) - again_s)
    return [f"{what} cost {money.usd(cost)}{share}: restart {restart}, done again {money.duration(again_s)}"]


def gpus(report: Mapping[str, Any]) -> list[str]:
    """How busy and how full the GPUs were, in a line; none where that was not measured."""
    if report["gpu_utilization"] is None:
        return []
    memory = ""
    if report["gpu_memory_gib"] is not None:
        memory = f", at most {report['gpu_memory_gib']:.1f} of {report['gpu_memory_total_gib']:.0f} GiB in use"
    hours = f"{report['gpu_busy_hours']:.2f} of {report['gpu_hours']:.2f} paid GPU hours"
    return [f"GPUs busy {money.percent(report['gpu_utilization'])}, {hours}{memory}"]


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
    return [f"{what} cost {money.usd(cost)}: {money.duration(sum(seconds))} without a sign of life"]


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
    moved = money.size(found["sent_bytes"] + found["fetched_bytes"])
    return [
        f"Not in the cost, estimated: {money.size(found['stored_bytes'])} in the bucket are"
        f" {money.usd(found['storage_usd_per_month'])} a month; {moved} sent and fetched are free in one region,"
        f" {money.usd(found['other_region_usd'])} to another, {money.usd(found['other_cloud_usd'])} to another cloud."
    ]


# Reports and dev clusters as plain text.

# A report as plain text, 80 columns wide.

WIDTH = 80
_BAR = 28
LISTED = (
    "run_id", "state", "attempts", "paid_s", "useful_s", "cost_usd", "on_demand_usd", "goodput", "user",
    "unreconciled_s", "unpriced_s",
)  # fmt: skip


def run_text(report: Mapping[str, Any]) -> str:
    """One run: what it cost, its attempts, its phases."""
    parts = ["\n".join(_headline(report))]
    if report["attempts"]:
        parts += [_attempts(report["attempts"]), _phases(report)]
    parts += [_data(report["data_rows"])] if report["data_rows"] else []
    parts += ["\n".join(textwrap.fill(note, WIDTH) for note in notes)] if (notes := notes_of(report)) else []
    return "\n\n".join(parts)


def runs_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Many runs, one line each, and their sum; of each ``LISTED`` is looked at."""
    header = ["RUN", "STATE", "ATTEMPTS", "PAID", "COST", "ON DEMAND", "GOODPUT", "USER"]
    lines = [
        [row["run_id"], row["state"], str(row["attempts"]), money.duration(row["paid_s"]), money.usd(row["cost_usd"]),
         money.usd(row["on_demand_usd"]), money.percent(row["goodput"]), cut(row["user"], 12)]
        for row in rows
    ]  # fmt: skip
    paid_s = sum(row["paid_s"] for row in rows)
    useful_s = sum(row["useful_s"] for row in rows)
    cost_usd = money.known(row["cost_usd"] for row in rows)
    # Beside the cost of all: of some of them it would look like a loss.
    on_demand = [row["on_demand_usd"] for row in rows if row["paid_s"]]
    on_demand_usd = None if None in on_demand else sum(on_demand)
    lines.append(
        [f"{len(rows)} runs" if len(rows) != 1 else "1 run", "", str(sum(row["attempts"] for row in rows)),
         money.duration(paid_s), money.usd(cost_usd), money.usd(on_demand_usd),
         money.percent(useful_s / paid_s if paid_s else None), ""]
    )  # fmt: skip
    notes = unknowns_of(*(sum(row[name] for row in rows) for name in ("unreconciled_s", "unpriced_s")))
    return "\n\n".join([columns(header, lines, right=(2, 3, 4, 5, 6)), *(["\n".join(notes)] if notes else [])])


def groups_text(by: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Chargeback: a group a line with its share of the cost, their sum, and what is not in it.

    What dev clusters cost while no run was on them has a column where there is any, and is part of the share.
    """
    header = [by.upper(), "RUNS", "PAID", "GPU HOURS", "COST", "IDLE", "SAVED", "GOODPUT", "SHARE", ""]
    cost_usd, idle_usd = (money.known(row[name] for row in rows) for name in ("cost_usd", "idle_usd"))
    all_usd = (cost_usd or 0.0) + (idle_usd or 0.0)
    lines = []
    for row in rows:
        share = spent_usd(row) / all_usd if all_usd else 0.0
        lines.append(
            [cut(row[by], 24), str(row["runs"]), money.duration(row["paid_s"]), f"{row['gpu_hours']:,.1f}",
             money.usd(row["cost_usd"]), money.usd(row["idle_usd"]), money.usd(row["saved_usd"]),
             money.percent(row["goodput"]), money.percent(share), _bar(share, 12) if share else ""]
        )  # fmt: skip
    paid_s = sum(row["paid_s"] for row in rows)
    gpu_hours = sum(row["gpu_hours"] for row in rows)
    saved = [row["saved_usd"] for row in rows if row["compared_runs"]]
    lines.append(
        ["all", "", money.duration(paid_s), f"{gpu_hours:,.1f}", money.usd(cost_usd), money.usd(idle_usd),
         money.usd(sum(saved)) if saved else "", *[""] * 3]
    )  # fmt: skip
    if idle_usd == 0:
        header, *lines = ([*line[:5], *line[6:]] for line in (header, *lines))
    notes = unknowns_of(*(sum(row[name] for row in rows) for name in ("unreconciled_s", "unpriced_s")))
    compared, runs = (sum(row[name] for row in rows) for name in ("compared_runs", "runs"))
    if saved and compared < runs:
        notes.append(f"Saved is of {compared} of {runs} runs: what the others would have cost on demand is not known.")
    return "\n\n".join(
        [columns(header, lines, right=range(1, len(header) - 1)), *(["\n".join(notes)] if notes else [])]
    )


def unknowns_of(unreconciled_s: float, unpriced_s: float) -> list[str]:
    """What is not known of the seconds that were paid."""
    notes = []
    if unreconciled_s:
        seconds = money.duration(unreconciled_s)
        notes.append(f"{seconds} are by the machine's own clock: the engine's history of them is not to be had here.")
    if unpriced_s:
        notes.append(f"{money.duration(unpriced_s)} are not in the cost: no price was frozen for where they ran.")
    return notes


def notes_of(report: Mapping[str, Any]) -> list[str]:
    """What a reader must know before he trusts the figures."""
    notes = losses(report)
    if report["budget_usd"] and report["cost_usd"] is not None:
        share = money.percent(report["cost_usd"] / report["budget_usd"])
        notes.append(f"{share} of the budget of {money.usd(report['budget_usd'])} is used up.")
    notes += unknowns_of(report["unreconciled_s"], report["unpriced_s"])
    notes += estimated(report)
    unknown = report["phases"]["unknown_s"]
    if report["paid_s"] and unknown / report["paid_s"] >= 0.05:
        notes.append(_unknown(report["attempts"], unknown))
    return notes


def _unknown(attempts: Sequence[Mapping[str, Any]], unknown_s: float) -> str:
    """Why it is not known what some of the paid time was for."""
    if any(attempt["ended_at"] is None for attempt in attempts):
        return f"{money.duration(unknown_s)} are unknown so far: events arrive in parts."
    refused = [one for one in attempts if not one["claimed"] and one["end_reason"] == "failed"]
    if sum(one["phases"]["unknown_s"] for one in refused) > unknown_s / 2:
        why = "a start that is refused leaves no events; the log says why"
    else:
        why = "a machine that vanishes takes its last events with it"
    return f"{money.duration(unknown_s)} are unknown: {why}."


def _headline(report: Mapping[str, Any]) -> list[str]:
    who = report["user"] + (f" ({report['team']})" if report["team"] else "")
    lines = [f"{report['run_id']}  {report['state']}  {cut(plain(report['config']), 36)}  {plain(who)}"]
    cost = money.usd(report["cost_usd"])
    if report["on_demand_usd"] is None:
        lines.append(f"cost {cost}")
    else:
        lines.append(f"cost {cost}, {saved(report)} ({money.usd(report['on_demand_usd'])})")
    waited = report["phases"]["queue_s"]
    lines.append(
        f"goodput {money.percent(report['goodput'])} of {money.duration(report['paid_s'])} paid; "
        f"waited {money.duration(waited)} for machines, unpaid"
    )
    lines.append(
        f"{money.count(report['useful_steps'])} steps, {money.count(report['replayed_steps'])} of them done again, "
        f"{money.count(report['tokens'])} tokens{_per_million(report['usd_per_million_tokens'])}"
    )
    return [*lines, *preemptions(report), *stalls(report), *gpus(report)]


def _per_million(amount: float | None) -> str:
    return "" if amount is None else f" ({money.usd(amount)} a million)"


def _attempts(attempts: Sequence[Mapping[str, Any]]) -> str:
    header = ["ATTEMPT", "MACHINE", "KIND", "$/HOUR", "PAID", "COST", "STEPS", "ENDED"]
    rows = [
        [
            str(attempt["attempt"] or money.NONE),
            cut(machine(attempt), 20),
            market(attempt),
            money.NONE if attempt["price_usd_per_hour"] is None else f"{attempt['price_usd_per_hour']:.2f}",
            money.duration(attempt["paid_s"]),
            money.usd(attempt["cost_usd"]),
            steps(attempt),
            end(attempt),
        ]
        for attempt in attempts
    ]
    return columns(header, rows, right=(3, 4, 5, 6))


def _phases(report: Mapping[str, Any]) -> str:
    paid_s = report["paid_s"]
    rows = []
    for phase, (name, _) in PHASES.items():
        seconds = report["phases"][f"{phase}_s"]
        if money.is_seen(seconds):
            share = seconds / paid_s
            rows.append([name, money.duration(seconds), money.percent(share), _bar(share)])
    return columns(["PHASE", "TIME", "SHARE", ""], rows, right=(1, 2))


def _data(sources: Sequence[Mapping[str, Any]]) -> str:
    header = ["DATA", "ROWS", "DROPPED", "TRUNCATED", "EMPTY", ""]
    rows = [
        [_end_of(plain(one["source"]), 20), *(money.count(one[name]) for name in COUNTS), use_of(one)]
        for one in sources
    ]
    return columns(header, rows, right=(1, 2, 3, 4))


def _end_of(text: str, most: int) -> str:
    """The end of a path says more than its start."""
    return text if len(text) <= most else f"…{text[1 - most :]}"


def _bar(share: float, width: int = _BAR) -> str:
    """Eighths of a block; whatever there is shows at least one."""
    eighths = max(1, round(share * width * 8))
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


# Dev clusters as plain text: a line each, a line for each run on it, and what burns now.

STALE_S = 600.0


def clusters_text(rows: Sequence[Mapping[str, Any]], now: float) -> str:
    """``rows``: as of ``cluster_rows``."""
    header = ["CLUSTER", "OWNER", "INFRA", "GPUS", "PAID", "COST", "RUNS", "IDLE", "IDLE COST"]
    lines: list[list[str]] = []
    for row in rows:
        gpus = f"{row['nodes']} × " if row["nodes"] > 1 else ""
        lines.append(
            [cut(row["name"], 30), cut(row["owner"], 12), row["infra"], f"{gpus}{row['accelerators'] or 'cpu'}",
             money.duration(row["paid_s"]), money.usd(row["cost_usd"]), str(len(row["runs"])),
             money.duration(row["idle_s"]), money.usd(row["idle_usd"])]
        )  # fmt: skip
        lines += [
            [f"  {run['run_id']}", cut(run["user"], 12), "", "", money.duration(run["paid_s"]),
             money.usd(run["cost_usd"]), "", "", ""]
            for run in row["runs"]
        ]  # fmt: skip
    notes = [note for row in rows if (note := note_of(row, now))]
    return "\n\n".join([columns(header, lines, right=(4, 5, 6, 7, 8)), *(["\n".join(notes)] if notes else [])])


def note_of(row: Mapping[str, Any], now: float) -> str:
    """What a cluster that is up burns while nobody has it, and since when; empty for any other."""
    hourly = row["idle_usd_per_hour"]
    if not row["is_up"] or hourly == 0:
        return ""
    whose = plain(f"{row['name']} of {row['owner']}")
    stale_s = now - row["seen_at"]
    burns = "at a price that is not known" if hourly is None else f"burning {money.usd(hourly)}/h"
    burns += " now" if stale_s <= STALE_S and hourly is not None else ""
    if row["idle_since"] is None:
        text = f"{whose} is idle in part, {burns}."
    else:
        lasts = money.duration(row["seen_at"] - row["idle_since"])
        text = f"{whose} has been idle for {lasts}, {burns} (spotune dev down {plain(row['name'])})."
    if stale_s > STALE_S:
        text += f" That was {money.duration(stale_s)} ago, when SkyPilot was last asked."
    return text
