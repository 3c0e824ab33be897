"""The scorecard, by hand: what is counted, what is timed, and what fails it."""

from dataclasses import replace
from typing import Any

import pytest

from drill.contender import Account
from drill.played import Life, Played
from drill.schedule import Instant, Kill
from drill.scorecard import passed, score, table
from drill.timeline import Measure, Pace, pace_of, recoveries, replayed, useful_s

KILL = Kill("vanish", Instant("train", 0.5), wipe=True)
MEASURE = Measure(Pace(4.0, 6.0, 0.5, 1.0, 11.0, steps=3, saves=1), "same")


def event(t: float, event: str, **fields: Any) -> dict[str, Any]:
    return {"t": t, "event": event, **fields}


def life(launched_at: float, ended_at: float, code: int, events: list[dict[str, Any]], landed: bool) -> Life:
    return Life(launched_at, ended_at, code, (-9,) if landed else (0,), KILL if landed else None, landed, events)


# 10 to 20 s: steps 1 and 2, lost after it; 20 to 36 s: from the commit of step 1 to the end.
FIRST = life(10, 20, -9, [
    event(11, "phase", phase="load"), event(14, "plan"), event(15, "step", step=1),
    event(15.5, "phase", phase="save"), event(15.6, "save", step=1), event(18, "step", step=2),
], True)  # fmt: skip
SECOND = life(20, 36, 0, [
    event(21, "phase", phase="load"), event(25, "phase", phase="restore"), event(27, "plan"),
    event(28, "step", step=2), event(30, "step", step=3), event(33, "phase", phase="teardown"),
], False)  # fmt: skip
TOLD = [event(20.5, "start"), event(22, "restored", step=1, commit="c", rejected=["step 2: bad"], restore_s=1.25)]
ACCOUNT = Account("same", {10.4: [], 20.5: TOLD}, {"orphan checkpoints": 1, "partial files": 0})
RUN = Played("r", [FIRST, SECOND], True, ACCOUNT)


def test_steps_and_seconds() -> None:
    lives = [FIRST, SECOND]
    assert replayed(lives) == 1
    assert useful_s(lives) == pytest.approx(1 + 3 + 2)  # steps 1 and 2 as first made, step 3
    (recovery,) = recoveries(lives, [10.4, 20.5])
    assert recovery == pytest.approx(
        {"launch": 0.5, "load": 4.5, "restore wait": 2.0, "first step": 1.0, "replay": 2.0, "total": 10.0}
    )
    (plain,) = recoveries(lives, [])
    assert (plain["launch"], plain["load"]) == (0, 5.0)


def test_an_attempt_without_a_new_step_is_no_recovery() -> None:
    cut = replace(SECOND, events=SECOND.events[:4])
    assert recoveries([FIRST, cut], []) == []


def test_the_pace_of_an_undisturbed_run() -> None:
    told = [event(16.5, "commit", step=1)]
    found = pace_of(replace(FIRST, events=[*FIRST.events, event(19, "phase", phase="teardown")]), told)
    assert found == Pace(start_s=4, train_s=5, save_s=1.0, end_s=1, life_s=10, steps=2, saves=1)
    alone = pace_of(FIRST, [])
    assert alone.save_s == pytest.approx(0.1)  # no bucket: a save ends when it is written
    assert alone.end_s == 0


def test_the_card() -> None:
    card = score("spotune", [RUN], MEASURE)
    expected = {
        "runs": 1, "finished": 1, "bit_identical": 1, "first_try": 1, "repairs": 0, "crashes": 0, "attempts": 2,
        "kills": 1, "kills_missed": 0, "kills_by_kind": {"vanish": 1}, "kills_by_instant": {"train": 1},
        "disks_wiped": 1, "steps_replayed": 1, "steps_too_many": 0, "checkpoints_rejected": 1,
        "goodput": round(6 / 26, 4),
        "restore_s": {"median": 1.25, "max": 1.25}, "leftovers": {"orphan checkpoints": 1},
    }  # fmt: skip
    assert {name: card[name] for name in expected} == expected
    assert passed(card)
    text = table([card, score("plain TRL", [replace(RUN, repairs=2)], MEASURE)])
    assert "| | spotune | plain TRL |" in text
    assert "| repairs by hand | 0 | 2 |" in text
    assert "| recovery: launch to first new step | 10.0 s (worst 10.0 s) | 10.0 s (worst 10.0 s) |" in text
    assert "| left over in the bucket | orphan checkpoints 1 | orphan checkpoints 1 |" in text


BAD: dict[str, tuple[dict[str, Any], bool]] = {
    "other weights": ({"account": replace(ACCOUNT, weights="other")}, False),
    "no result": ({"account": replace(ACCOUNT, weights=None)}, False),
    "not finished": ({"finished": False}, False),
    "repaired": ({"repairs": 1}, True),
    "a zombie that failed": ({"zombies": [1]}, True),
    "an attempt that failed": ({"lives": [FIRST, replace(SECOND, code=1), SECOND]}, True),
    "an attempt that hung": ({"lives": [FIRST, replace(SECOND, hung=True)]}, True),
    "a worker that outlived its guard": ({"lives": [replace(FIRST, survivors=["worker"]), SECOND]}, True),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_a_first_try(name: str) -> None:
    changes, is_passed = BAD[name]
    card = score("spotune", [RUN, replace(RUN, **changes)], MEASURE)
    assert card["first_try"] == 1
    assert passed(card) == is_passed


def test_steps_beyond_the_end_are_counted() -> None:
    longer = replace(SECOND, events=[*SECOND.events, event(35, "step", step=4)])
    assert score("plain TRL", [replace(RUN, lives=[FIRST, longer])], MEASURE)["steps_too_many"] == 1


def test_zombies_may_be_fenced_or_find_the_certificate() -> None:
    assert replace(RUN, zombies=[75, 0]).first_try
