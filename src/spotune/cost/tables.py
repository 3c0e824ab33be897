"""Reports and dev clusters as plain text."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from spotune.core.io import columns, cut, plain
from spotune.cost import words
from spotune.cost.read import COUNTS
from spotune.cost.rows import spent_usd

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
        [row["run_id"], row["state"], str(row["attempts"]), words.duration(row["paid_s"]), words.usd(row["cost_usd"]),
         words.usd(row["on_demand_usd"]), words.percent(row["goodput"]), cut(row["user"], 12)]
        for row in rows
    ]  # fmt: skip
    paid_s = sum(row["paid_s"] for row in rows)
    useful_s = sum(row["useful_s"] for row in rows)
    cost_usd = words.known(row["cost_usd"] for row in rows)
    # Beside the cost of all: of some of them it would look like a loss.
    on_demand = [row["on_demand_usd"] for row in rows if row["paid_s"]]
    on_demand_usd = None if None in on_demand else sum(on_demand)
    lines.append(
        [f"{len(rows)} runs" if len(rows) != 1 else "1 run", "", str(sum(row["attempts"] for row in rows)),
         words.duration(paid_s), words.usd(cost_usd), words.usd(on_demand_usd),
         words.percent(useful_s / paid_s if paid_s else None), ""]
    )  # fmt: skip
    notes = unknowns_of(*(sum(row[name] for row in rows) for name in ("unreconciled_s", "unpriced_s")))
    return "\n\n".join([columns(header, lines, right=(2, 3, 4, 5, 6)), *(["\n".join(notes)] if notes else [])])


def groups_text(by: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Chargeback: a group a line with its share of the cost, their sum, and what is not in it.

    What dev clusters cost while no run was on them has a column where there is any, and is part of the share.
    """
    header = [by.upper(), "RUNS", "PAID", "GPU HOURS", "COST", "IDLE", "SAVED", "GOODPUT", "SHARE", ""]
    cost_usd, idle_usd = (words.known(row[name] for row in rows) for name in ("cost_usd", "idle_usd"))
    all_usd = (cost_usd or 0.0) + (idle_usd or 0.0)
    lines = []
    for row in rows:
        share = spent_usd(row) / all_usd if all_usd else 0.0
        lines.append(
            [cut(row[by], 24), str(row["runs"]), words.duration(row["paid_s"]), f"{row['gpu_hours']:,.1f}",
             words.usd(row["cost_usd"]), words.usd(row["idle_usd"]), words.usd(row["saved_usd"]),
             words.percent(row["goodput"]), words.percent(share), _bar(share, 12) if share else ""]
        )  # fmt: skip
    paid_s = sum(row["paid_s"] for row in rows)
    gpu_hours = sum(row["gpu_hours"] for row in rows)
    saved = [row["saved_usd"] for row in rows if row["compared_runs"]]
    lines.append(
        ["all", "", words.duration(paid_s), f"{gpu_hours:,.1f}", words.usd(cost_usd), words.usd(idle_usd),
         words.usd(sum(saved)) if saved else "", *[""] * 3]
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
        seconds = words.duration(unreconciled_s)
        notes.append(f"{seconds} are by the machine's own clock: the engine's history of them is not to be had here.")
    if unpriced_s:
        notes.append(f"{words.duration(unpriced_s)} are not in the cost: no price was frozen for where they ran.")
    return notes


def notes_of(report: Mapping[str, Any]) -> list[str]:
    """What a reader must know before he trusts the figures."""
    notes = words.losses(report)
    if report["budget_usd"] and report["cost_usd"] is not None:
        share = words.percent(report["cost_usd"] / report["budget_usd"])
        notes.append(f"{share} of the budget of {words.usd(report['budget_usd'])} is used up.")
    notes += unknowns_of(report["unreconciled_s"], report["unpriced_s"])
    notes += words.estimated(report)
    unknown = report["phases"]["unknown_s"]
    if report["paid_s"] and unknown / report["paid_s"] >= 0.05:
        notes.append(_unknown(report["attempts"], unknown))
    return notes


def _unknown(attempts: Sequence[Mapping[str, Any]], unknown_s: float) -> str:
    """Why it is not known what some of the paid time was for."""
    if any(attempt["ended_at"] is None for attempt in attempts):
        return f"{words.duration(unknown_s)} are unknown so far: events arrive in parts."
    refused = [one for one in attempts if not one["claimed"] and one["end_reason"] == "failed"]
    if sum(one["phases"]["unknown_s"] for one in refused) > unknown_s / 2:
        why = "a start that is refused leaves no events; the log says why"
    else:
        why = "a machine that vanishes takes its last events with it"
    return f"{words.duration(unknown_s)} are unknown: {why}."


def _headline(report: Mapping[str, Any]) -> list[str]:
    who = report["user"] + (f" ({report['team']})" if report["team"] else "")
    lines = [f"{report['run_id']}  {report['state']}  {cut(plain(report['config']), 36)}  {plain(who)}"]
    cost = words.usd(report["cost_usd"])
    if report["on_demand_usd"] is None:
        lines.append(f"cost {cost}")
    else:
        lines.append(f"cost {cost}, {words.saved(report)} ({words.usd(report['on_demand_usd'])})")
    waited = report["phases"]["queue_s"]
    lines.append(
        f"goodput {words.percent(report['goodput'])} of {words.duration(report['paid_s'])} paid; "
        f"waited {words.duration(waited)} for machines, unpaid"
    )
    lines.append(
        f"{words.count(report['useful_steps'])} steps, {words.count(report['replayed_steps'])} of them done again, "
        f"{words.count(report['tokens'])} tokens{_per_million(report['usd_per_million_tokens'])}"
    )
    return [*lines, *words.preemptions(report), *words.stalls(report), *words.gpus(report)]


def _per_million(amount: float | None) -> str:
    return "" if amount is None else f" ({words.usd(amount)} a million)"


def _attempts(attempts: Sequence[Mapping[str, Any]]) -> str:
    header = ["ATTEMPT", "MACHINE", "KIND", "$/HOUR", "PAID", "COST", "STEPS", "ENDED"]
    rows = [
        [
            str(attempt["attempt"] or words.NONE),
            cut(words.machine(attempt), 20),
            words.market(attempt),
            words.NONE if attempt["price_usd_per_hour"] is None else f"{attempt['price_usd_per_hour']:.2f}",
            words.duration(attempt["paid_s"]),
            words.usd(attempt["cost_usd"]),
            words.steps(attempt),
            words.end(attempt),
        ]
        for attempt in attempts
    ]
    return columns(header, rows, right=(3, 4, 5, 6))


def _phases(report: Mapping[str, Any]) -> str:
    paid_s = report["paid_s"]
    rows = []
    for phase, (name, _) in words.PHASES.items():
        seconds = report["phases"][f"{phase}_s"]
        if words.is_seen(seconds):
            share = seconds / paid_s
            rows.append([name, words.duration(seconds), words.percent(share), _bar(share)])
    return columns(["PHASE", "TIME", "SHARE", ""], rows, right=(1, 2))


def _data(sources: Sequence[Mapping[str, Any]]) -> str:
    header = ["DATA", "ROWS", "DROPPED", "TRUNCATED", "EMPTY", ""]
    rows = [
        [_end_of(plain(one["source"]), 20), *(words.count(one[name]) for name in COUNTS), words.use_of(one)]
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
             words.duration(row["paid_s"]), words.usd(row["cost_usd"]), str(len(row["runs"])),
             words.duration(row["idle_s"]), words.usd(row["idle_usd"])]
        )  # fmt: skip
        lines += [
            [f"  {run['run_id']}", cut(run["user"], 12), "", "", words.duration(run["paid_s"]),
             words.usd(run["cost_usd"]), "", "", ""]
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
    burns = "at a price that is not known" if hourly is None else f"burning {words.usd(hourly)}/h"
    burns += " now" if stale_s <= STALE_S and hourly is not None else ""
    if row["idle_since"] is None:
        text = f"{whose} is idle in part, {burns}."
    else:
        lasts = words.duration(row["seen_at"] - row["idle_since"])
        text = f"{whose} has been idle for {lasts}, {burns} (spotune dev down {plain(row['name'])})."
    if stale_s > STALE_S:
        text += f" That was {words.duration(stale_s)} ago, when SkyPilot was last asked."
    return text
