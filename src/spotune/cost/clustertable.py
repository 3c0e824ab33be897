"""Dev clusters as plain text: a line each, a line for each run on it, and what burns now."""

from collections.abc import Mapping, Sequence
from typing import Any

from spotune.contracts.columns import columns, cut, plain
from spotune.cost import words

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
