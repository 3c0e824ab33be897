"""A run whose every second can be checked by hand, and pieces to make others of."""

from typing import Any

from spotune.core.records import AttemptRecord, Certificate, Commit, PriceRow, RunRecord
from spotune.cost.machines import RunData
from spotune.launch.engine import PaidInterval

RUN_ID = "orders-k3x9"
T = 1_700_000_000.0  # submitted
FIRST = "runs/orders-k3x9/commits/0001-00000002.json"
Event = dict[str, Any]


def price(use_spot: bool, usd: float, **facts: str) -> PriceRow:
    facts = {"infra": "local", "region": "local", "instance_type": "local", "source": "local price table"} | facts
    return PriceRow(use_spot=use_spot, price_usd_per_hour=usd, **facts)


def run(**facts: Any) -> RunRecord:
    given: dict[str, Any] = {
        "run_id": RUN_ID,
        "created_at": T,
        "user": "ana",
        "team": "research",
        "config_path": "config/runs/orders.yaml",
        "config": {},
        "config_sha256": "c",
        "data_sha256": "d",
        "infra": "local",
        "prices": [vars(price(True, 0.36)), vars(price(False, 0.72))],
    }
    return RunRecord(**(given | facts))


def row(start: float, end: float | None, **facts: Any) -> PaidInterval:
    """An engine's row, ``start`` and ``end`` in seconds after submission."""
    given = {"infra": "local", "region": "local", "zone": "local-0", "instance_type": "local", "use_spot": True}
    ended_at = None if end is None else T + end
    return PaidInterval(run_id=RUN_ID, started_at=T + start, ended_at=ended_at, **(given | facts))


def claim(attempt: int, at: float, **facts: Any) -> AttemptRecord:
    return AttemptRecord(run_id=RUN_ID, attempt=attempt, claimed_at=T + at, claim_id=f"c{attempt}", **facts)


def event(at: float, name: str, **fields: Any) -> Event:
    return {"t": T + at, "event": name, **fields}


def phase(at: float, name: str) -> Event:
    return event(at, "phase", phase=name)


def step(at: float, number: int, data_wait_s: float = 0.0) -> Event:
    return event(at, "step", step=number, tokens=number * 100, data_wait_s=data_wait_s)


def log(at: float, number: int, loss: float) -> Event:
    return event(at, "log", step=number, loss=loss)


def commit(attempt: int, number: int) -> Commit:
    return Commit(run_id=RUN_ID, attempt=attempt, step=number, tokens=number * 100, files={})


def three_attempts() -> RunData:
    """Preempted with notice after 2 steps, without notice after step 4, then certified at step 6.

    attempt 1: paid 10-30: provision 2, setup 3, load 5, train 4 + 4 (data 1 each), save 1, leaving 1
    attempt 2: paid 40-60: provision 5, load 2, restore 1, train 3 + 3, eval 2, then 4 seconds nobody knows
    attempt 3: paid 65-95: provision 1, load 4, restore 1, step 3 again 3, eval again 2, step 4 again 3,
               steps 5 and 6: 3 + 3, save 2, leaving 8
    """
    events = {
        1: [
            event(15, "start"), phase(15, "load"), event(15, "restored", step=0, commit=None), phase(20, "train"),
            step(24, 1, 1.0), log(24, 1, 3.0), event(26, "notice"), step(28, 2, 1.0), log(28, 2, 2.5),
            phase(28, "save"), phase(29, "train"), event(29.5, "commit", step=2),
            event(29.5, "end", reason="preempted", exit_code=75),
        ],
        2: [
            event(45, "start"), phase(45, "load"), event(46, "restored", step=2, commit=FIRST),
            phase(47, "restore"), phase(48, "train"), step(51, 3), log(51, 3, 2.2),
            phase(51, "eval"), phase(53, "train"), step(56, 4), log(56, 4, 2.0),
        ],
        3: [
            event(66, "start"), phase(66, "load"), event(67, "restored", step=2, commit=FIRST),
            phase(70, "restore"), phase(71, "train"), step(74, 3), log(74, 3, 2.2),
            phase(74, "eval"), phase(76, "train"), step(79, 4), log(79, 4, 2.0), step(82, 5), log(82, 5, 1.8),
            step(85, 6), log(85, 6, 1.7), phase(85, "save"), phase(87, "teardown"), event(90, "commit", step=6),
            event(94, "end", reason="completed", exit_code=0),
        ],
    }  # fmt: skip
    return RunData(
        run=run(),
        intervals=[
            row(10, 30, setup_s=3.0, end_reason="preempted", exit_code=75),
            row(40, 60, end_reason="preempted"),
            row(65, 95, end_reason="exited", exit_code=0),
        ],
        attempts=[claim(1, 15), claim(2, 45), claim(3, 66)],
        events=events,
        commits=[commit(1, 2), commit(3, 6)],
        certificate=Certificate(run_id=RUN_ID, attempt=3, step=6, weights_sha256="w", files={}),
    )
