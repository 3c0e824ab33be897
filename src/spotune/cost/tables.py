"""Formats reports and dev clusters as plain text."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from spotune.core import money
from spotune.core.io import columns, cut, plain
from spotune.cost.export import spent_usd
from spotune.cost.index import COUNTS

WIDTH = 80  # of a run's report, columns
STALE_S = 600.0
# What the list of runs shows of a run's totals.
LISTED = (
    "run_id", "state", "attempts", "paid_s", "useful_s", "cost_usd", "on_demand_usd", "goodput", "user",
    "unreconciled_s", "unpriced_s",
)  # fmt: skip
# Phase -> its name and what it is, in the order of the report.
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
    """Returns what ran and where: ``2 × g6.xlarge L4:1, aws us-east-1a``."""
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
    """Returns what a source's rows are used for."""
    return f"{source['set']}{', streamed' if source['rows'] is None else ''}"


def end(attempt: Mapping[str, Any]) -> str:
    return str(attempt["end_reason"] or "running")


# Notes: each function returns a list of lines, empty if there is nothing to report.


def preemptions(report: Mapping[str, Any]) -> list[str]:
    """Returns what all lost machines cost together, in a line."""
    lost = report["preemptions"]
    if not lost:
        return []
    cost, total = money.cost_of(lost), report["cost_usd"]
    again_s = sum(one["replayed_s"] for one in lost)
    share = f" ({money.percent(cost / total)})" if total and cost is not None else ""
    restart = money.duration(sum(one["paid_s"] for one in lost) - again_s)
    what = _number(len(lost), "lost machine")
    return [f"{what} cost {money.usd(cost)}{share}: restart {restart}, done again {money.duration(again_s)}"]


def gpus(report: Mapping[str, Any]) -> list[str]:
    """Returns how busy and how full the GPUs were, in a line."""
    if report["gpu_utilization"] is None:
        return []
    memory = ""
    if report["gpu_memory_gib"] is not None:
        memory = f", at most {report['gpu_memory_gib']:.1f} of {report['gpu_memory_total_gib']:.0f} GiB in use"
    hours = f"{report['gpu_busy_hours']:.2f} of {report['gpu_hours']:.2f} paid GPU hours"
    return [f"GPUs busy {money.percent(report['gpu_utilization'])}, {hours}{memory}"]


def stalls(report: Mapping[str, Any]) -> list[str]:
    """Returns what the time without a sign of life cost, in a line."""
    hung = [attempt for attempt in report["attempts"] if attempt["phases"]["stalled_s"] > 0]
    if not hung:
        return []
    cost: float | None = 0.0
    for attempt in hung:
        price, hours = attempt["price_usd_per_hour"], attempt["phases"]["stalled_s"] / money.HOUR_S
        cost = None if cost is None or price is None else cost + hours * price * attempt["nodes"]
    stalled = money.duration(sum(attempt["phases"]["stalled_s"] for attempt in hung))
    return [f"{_number(len(hung), 'stalled attempt')} cost {money.usd(cost)}: {stalled} without a sign of life"]


def losses(report: Mapping[str, Any]) -> list[str]:
    """Returns where the loss was NaN or infinite, a line for each attempt."""
    found = []
    for attempt in report["attempts"]:
        if points := attempt.get("losses_not_finite"):
            (step, loss), last = points[0], points[-1][0]
            until = f" to {last}" if last != step else ""
            found.append(f"Attempt {attempt['attempt']}: the loss is not finite ({loss}) at step {step}{until}.")
    return found


def notes_of(report: Mapping[str, Any]) -> list[str]:
    """Returns what a reader must know before trusting the figures."""
    notes = losses(report)
    if report["budget_usd"] and report["cost_usd"] is not None:
        share = money.percent(report["cost_usd"] / report["budget_usd"])
        notes.append(f"{share} of the budget of {money.usd(report['budget_usd'])} is used up.")
    notes += _unknowns([report])
    bucket = report.get("estimates")
    if bucket and bucket["storage_usd_per_month"] is not None:
        moved = money.size(bucket["sent_bytes"] + bucket["fetched_bytes"])
        notes.append(
            f"Not in the cost, estimated: {money.size(bucket['stored_bytes'])} in the bucket cost"
            f" {money.usd(bucket['storage_usd_per_month'])} a month; {moved} sent and fetched are free in one region,"
            f" {money.usd(bucket['other_region_usd'])} to another, {money.usd(bucket['other_cloud_usd'])} to another"
            " cloud."
        )
    unknown_s = report["phases"]["unknown_s"]
    if report["paid_s"] and unknown_s / report["paid_s"] >= 0.05:
        refused = [one for one in report["attempts"] if not one["claimed"] and one["end_reason"] == "failed"]
        if any(attempt["ended_at"] is None for attempt in report["attempts"]):
            why = " so far: events arrive in parts"
        elif sum(one["phases"]["unknown_s"] for one in refused) > unknown_s / 2:
            why = ": a start that is refused leaves no events; the log says why"
        else:
            why = ": a machine that vanishes takes its last events with it"
        notes.append(f"{money.duration(unknown_s)} are unknown{why}.")
    return notes


def _unknowns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns what is unknown of the paid seconds of these runs or groups."""
    unreconciled_s, unpriced_s = (sum(row[name] for row in rows) for name in ("unreconciled_s", "unpriced_s"))
    notes = []
    if unreconciled_s:
        seconds = money.duration(unreconciled_s)
        notes.append(f"{seconds} are by the machine's own clock: the engine's history of them is not available here.")
    if unpriced_s:
        notes.append(f"{money.duration(unpriced_s)} are not in the cost: no price was frozen for where they ran.")
    return notes


# One run.


def run_text(report: Mapping[str, Any]) -> str:
    """Formats one run: what it cost, its attempts, its phases. 80 columns wide."""
    parts = ["\n".join(_headline(report))]
    if report["attempts"]:
        parts += [_attempts(report["attempts"]), _phases(report)]
    if report["data_rows"]:
        header = ["DATA", "ROWS", "DROPPED", "TRUNCATED", "EMPTY", ""]
        rows = []
        for one in report["data_rows"]:
            source = plain(one["source"])
            source = source if len(source) <= 20 else f"…{source[-19:]}"  # a path's end says more than its start
            rows.append([source, *(money.count(one[name]) for name in COUNTS), use_of(one)])
        parts.append(columns(header, rows, right=(1, 2, 3, 4)))
    notes = notes_of(report)
    return _with_notes("\n\n".join(parts), [textwrap.fill(note, WIDTH) for note in notes])


def _headline(report: Mapping[str, Any]) -> list[str]:
    user = report["user"] + (f" ({report['team']})" if report["team"] else "")
    saved, base, million = report["saved_usd"], report["on_demand_usd"], report["usd_per_million_tokens"]
    cost = f"cost {money.usd(report['cost_usd'])}"
    if base is not None:
        share = f" ({money.percent(abs(saved) / base)})" if base and saved is not None else ""
        words = "less" if saved is None or saved >= 0 else "more"
        difference = money.NONE if saved is None else f"{money.usd(abs(saved))}{share} {words} than on demand"
        cost += f", {difference} ({money.usd(base)})"
    waited = money.duration(report["phases"]["queue_s"])
    per_million = "" if million is None else f" ({money.usd(million)} a million)"
    return [
        f"{report['run_id']}  {report['state']}  {cut(plain(report['config']), 36)}  {plain(user)}",
        cost,
        f"goodput {money.percent(report['goodput'])} of {money.duration(report['paid_s'])} paid; "
        f"waited {waited} for machines, unpaid",
        f"{money.count(report['useful_steps'])} steps, {money.count(report['replayed_steps'])} of them done again, "
        f"{money.count(report['tokens'])} tokens{per_million}",
        *preemptions(report),
        *stalls(report),
        *gpus(report),
    ]


def _attempts(attempts: Sequence[Mapping[str, Any]]) -> str:
    header = ["ATTEMPT", "MACHINE", "KIND", "$/HOUR", "PAID", "COST", "STEPS", "ENDED"]
    rows = []
    for attempt in attempts:
        price = attempt["price_usd_per_hour"]
        rows.append(
            [str(attempt["attempt"] or money.NONE), cut(machine(attempt), 20), market(attempt),
             money.NONE if price is None else f"{price:.2f}", money.duration(attempt["paid_s"]),
             money.usd(attempt["cost_usd"]), steps(attempt), end(attempt)]
        )  # fmt: skip
    return columns(header, rows, right=(3, 4, 5, 6))


def _phases(report: Mapping[str, Any]) -> str:
    rows = []
    for phase, (name, _) in PHASES.items():
        seconds = report["phases"][f"{phase}_s"]
        if money.is_seen(seconds):
            share = seconds / report["paid_s"]
            rows.append([name, money.duration(seconds), money.percent(share), _bar(share, 28)])
    return columns(["PHASE", "TIME", "SHARE", ""], rows, right=(1, 2))


def _bar(share: float, width: int) -> str:
    """Draws eighths of a block, at least one."""
    eighths = max(1, round(share * width * 8))
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _with_notes(text: str, notes: Sequence[str]) -> str:
    return "\n\n".join([text, "\n".join(notes)] if notes else [text])


def _number(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


# Many runs, groups and dev clusters: a line each.


def runs_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Formats many runs, one line each, and their sum. Uses only the columns in ``LISTED``."""
    header = ["RUN", "STATE", "ATTEMPTS", "PAID", "COST", "ON DEMAND", "GOODPUT", "USER"]
    lines = [
        [row["run_id"], row["state"], str(row["attempts"]), money.duration(row["paid_s"]), money.usd(row["cost_usd"]),
         money.usd(row["on_demand_usd"]), money.percent(row["goodput"]), cut(row["user"], 12)]
        for row in rows
    ]  # fmt: skip
    attempts, paid_s, useful_s = (sum(row[name] for row in rows) for name in ("attempts", "paid_s", "useful_s"))
    # The cost is that of all runs: an on-demand sum of only some of them would look like a loss.
    on_demand = [row["on_demand_usd"] for row in rows if row["paid_s"]]
    on_demand_usd = None if None in on_demand else sum(on_demand)
    lines.append(
        [_number(len(rows), "run"), "", str(attempts), money.duration(paid_s),
         money.usd(money.known(row["cost_usd"] for row in rows)), money.usd(on_demand_usd),
         money.percent(useful_s / paid_s if paid_s else None), ""]
    )  # fmt: skip
    return _with_notes(columns(header, lines, right=(2, 3, 4, 5, 6)), _unknowns(rows))


def groups_text(by: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Formats chargeback: a group a line with its share of the cost, their sum, and what is not in it.

    What idle dev clusters cost is part of the share, and has a column if there is any.
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
    names = ("paid_s", "gpu_hours", "compared_runs", "runs")
    paid_s, gpu_hours, compared, runs = (sum(row[name] for row in rows) for name in names)
    saved = [row["saved_usd"] for row in rows if row["compared_runs"]]
    lines.append(
        ["all", "", money.duration(paid_s), f"{gpu_hours:,.1f}", money.usd(cost_usd), money.usd(idle_usd),
         money.usd(sum(saved)) if saved else "", *[""] * 3]
    )  # fmt: skip
    if idle_usd == 0:
        header, *lines = ([*line[:5], *line[6:]] for line in (header, *lines))
    notes = _unknowns(rows)
    if saved and compared < runs:
        notes.append(f"Saved is of {compared} of {runs} runs: what the others would have cost on demand is unknown.")
    return _with_notes(columns(header, lines, right=range(1, len(header) - 1)), notes)


def clusters_text(rows: Sequence[Mapping[str, Any]], now: float) -> str:
    """Formats rows of ``cluster_rows``: a line each, a line for each run on it, and what idle clusters cost now."""
    header = ["CLUSTER", "OWNER", "INFRA", "GPUS", "PAID", "COST", "RUNS", "IDLE", "IDLE COST"]
    lines: list[list[str]] = []
    for row in rows:
        nodes = f"{row['nodes']} × " if row["nodes"] > 1 else ""
        lines.append(
            [cut(row["name"], 30), cut(row["owner"], 12), row["infra"], f"{nodes}{row['accelerators'] or 'cpu'}",
             money.duration(row["paid_s"]), money.usd(row["cost_usd"]), str(len(row["runs"])),
             money.duration(row["idle_s"]), money.usd(row["idle_usd"])]
        )  # fmt: skip
        lines += [
            [f"  {run['run_id']}", cut(run["user"], 12), "", "", money.duration(run["paid_s"]),
             money.usd(run["cost_usd"]), "", "", ""]
            for run in row["runs"]
        ]  # fmt: skip
    notes = [note for row in rows if (note := _idle_note(row, now))]
    return _with_notes(columns(header, lines, right=(4, 5, 6, 7, 8)), notes)


def _idle_note(row: Mapping[str, Any], now: float) -> str:
    """Returns what an idle cluster costs and since when; an empty text for a cluster that is down or in use."""
    hourly = row["idle_usd_per_hour"]
    if not row["is_up"] or hourly == 0:
        return ""
    cluster = plain(f"{row['name']} of {row['owner']}")
    stale_s = now - row["seen_at"]
    burns = "at an unknown price" if hourly is None else f"burning {money.usd(hourly)}/h"
    burns += " now" if stale_s <= STALE_S and hourly is not None else ""
    if row["idle_since"] is None:
        text = f"{cluster} is idle in part, {burns}."
    else:
        idle = money.duration(row["seen_at"] - row["idle_since"])
        text = f"{cluster} has been idle for {idle}, {burns} (spotune dev down {plain(row['name'])})."
    if stale_s > STALE_S:
        text += f" That was {money.duration(stale_s)} ago, when SkyPilot was last asked."
    return text
