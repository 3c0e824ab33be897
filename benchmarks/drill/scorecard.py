"""The scorecard of a game day: pure sums over what happened, as JSON and as a table."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from drill.played import Played
from drill.timeline import RECOVERY, Measure, recoveries, replayed, summary, useful_s


def score(name: str, runs: Sequence[Played], measure: Measure) -> dict[str, Any]:
    """One contender's scorecard; ``measure``: of its undisturbed run."""
    rows = [_row(run, measure) for run in runs]
    lives = [life for run in runs for life in run.lives]
    landed = [life.kill for life in lives if life.kill and life.landed]
    recovered = [one for run in runs for one in recoveries(run.lives, sorted(run.account.attempts))]
    told = [event for run in runs for events in run.account.attempts.values() for event in events]
    paid_s = sum(life.seconds for life in lives)
    return {
        "contender": name,
        "runs": len(runs),
        "finished": sum(row["finished"] for row in rows),
        "bit_identical": sum(row["bit_identical"] for row in rows),
        "first_try": sum(row["first_try"] for row in rows),
        "repairs": sum(run.repairs for run in runs),
        "crashes": sum(row["crashes"] for row in rows),
        "attempts": len(lives),
        "kills": len(landed),
        "kills_missed": sum(len(run.missed) for run in runs),
        "kills_by_kind": dict(Counter(kill.kind for kill in landed)),
        "kills_by_instant": dict(Counter(str(kill.when) for kill in landed)),
        "disks_wiped": sum(kill.wipe for kill in landed),
        "steps_replayed": sum(row["steps_replayed"] for row in rows),
        "steps_too_many": sum(row["steps_too_many"] for row in rows),
        "checkpoints_rejected": sum(row["checkpoints_rejected"] for row in rows),
        "recovery_s": {
            phase: summary([one[phase] for one in recovered]) for phase in (*RECOVERY, "total") if recovered
        },
        "restore_s": summary([event["restore_s"] for event in told if event.get("restore_s") and event.get("step")]),
        "goodput": round(sum(useful_s(run.lives) for run in runs) / paid_s, 4) if paid_s else 0.0,
        "leftovers": dict(sum((Counter(run.account.leftovers) for run in runs), Counter())),
        "zombies": dict(Counter(str(code) for run in runs for code in run.zombies)),
        "undisturbed": {**asdict(measure.pace), "weights_sha256": measure.weights},
        "per_run": rows,
    }


def _row(run: Played, measure: Measure) -> dict[str, Any]:
    weights = measure.weights
    rejected = [
        line
        for events in run.account.attempts.values()
        for event in events
        if event["event"] == "restored"
        for line in event.get("rejected") or []
    ]
    return {
        "run": run.name,
        "finished": run.finished and run.account.weights is not None,
        "bit_identical": run.finished and run.account.weights == weights,
        "first_try": run.first_try and run.account.weights == weights,
        "repairs": run.repairs,
        "crashes": sum(not life.landed and life.code not in (0, 75) for life in run.lives),
        "attempts": len(run.lives),
        "kills": [f"{life.kill.kind} {life.kill.when}" for life in run.lives if life.kill and life.landed],
        "codes": [life.code for life in run.lives],
        "steps_replayed": replayed(run.lives),
        "steps_too_many": max(0, max(life.last_step for life in run.lives) - measure.pace.steps),
        "checkpoints_rejected": len(rejected),
        "survivors": sorted({line for life in run.lives for line in life.survivors}),
        "log": run.log,
    }


def passed(card: Mapping[str, Any]) -> bool:
    """Whether every run was certified and ended as if nothing had happened."""
    return bool(card["finished"] == card["bit_identical"] == card["runs"])


LABELS = {
    "runs": "runs",
    "finished": "… finished (certified)",
    "bit_identical": "… bit-identical to the undisturbed run",
    "first_try": "… at the first try",
    "repairs": "repairs by hand",
    "crashes": "attempts that crashed",
    "attempts": "attempts",
    "kills": "kills",
    "kills_by_kind": "… by kind",
    "kills_by_instant": "… by instant",
    "disks_wiped": "… with the disk lost too",
    "steps_replayed": "steps made again",
    "steps_too_many": "steps made beyond the last one",
    "checkpoints_rejected": "checkpoints rejected",
    "recovery_s": "recovery: launch to first new step",
    "restore_s": "… fetching the checkpoint (beside the imports)",
    "goodput": "goodput: useful / paid seconds",
    "leftovers": "left over in the bucket",
}


def table(cards: Sequence[Mapping[str, Any]]) -> str:
    """The scorecards side by side, as Markdown."""
    lines = [f"| | {' | '.join(card['contender'] for card in cards)} |", "|---|" + "---|" * len(cards)]
    for key, label in LABELS.items():
        if key == "recovery_s":
            lines += _recovery_lines(cards, label)
        elif any(card[key] not in ({}, None) for card in cards):
            lines.append(f"| {label} | {' | '.join(_cell(key, card[key]) for card in cards)} |")
    return "\n".join(lines)


def _recovery_lines(cards: Sequence[Mapping[str, Any]], label: str) -> list[str]:
    named = {"total": label} | {phase: f"… {phase}" for phase in RECOVERY}
    rows = {phase: [_seconds(card["recovery_s"].get(phase)) for card in cards] for phase in named}
    return [f"| {named[phase]} | {' | '.join(cells)} |" for phase, cells in rows.items() if any(map("–".__ne__, cells))]


def _cell(key: str, value: Any) -> str:
    if key == "restore_s":
        return _seconds(value)
    if key == "goodput":
        return f"{100 * value:.0f} %"
    if isinstance(value, dict):
        return ", ".join(f"{name} {count}" for name, count in sorted(value.items()) if count) or "nothing"
    return str(value)


def _seconds(figures: Mapping[str, float] | None) -> str:
    return f"{figures['median']:.1f} s (worst {figures['max']:.1f} s)" if figures else "–"
