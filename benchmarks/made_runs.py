"""Runs as the bucket holds them after months of a team's work, made by the thousand: real records, invented content.

    python benchmarks/made_runs.py BUCKET_FOLDER RUNS

Each run has three attempts, two of them preempted, with an hour of events in four parts each, and its bills; nine of
ten are certified, the others failed or are paused. A real attempt's events come in more parts, one for each twentieth
of its age up to every 15 s: what reading them costs is not what this measures.
"""

import json
import random
import sys
import time
from pathlib import Path

from spotune.core.errors import FAILED, PAUSED, PREEMPTED
from spotune.core.keys import Keys
from spotune.core.records import AttemptRecord, Bill, Certificate, Commit, Mark, PriceRow, Record, RunRecord

ATTEMPTS, PARTS, STEPS = 3, 4, 40  # steps an attempt
PLACES = [
    ("aws", "us-east-1", "us-east-1a", "g6.xlarge", "L4:1", 0.32, 0.80),
    ("aws", "us-west-2", "us-west-2b", "g5.xlarge", "A10G:1", 0.41, 1.01),
    ("gcp", "us-central1", "us-central1-a", "g2-standard-4", "L4:1", 0.28, 0.71),
]
TEAMS = {"ana": "research", "ben": "research", "cho": "search", "dee": "search", "eli": ""}


def make_runs(folder: Path, count: int, days: float = 28.0, seed: int = 0) -> None:
    """Writes ``count`` runs, spread evenly over the last ``days``."""
    rng, now = random.Random(seed), time.time()
    for number in range(count):
        _make_run(folder, f"run-{number:05d}", now - (number + 1) / count * days * 86400, rng)


def _make_run(folder: Path, run_id: str, at: float, rng: random.Random) -> None:
    keys, user = Keys(run_id), rng.choice(list(TEAMS))
    rows = [
        PriceRow(infra=infra, region=region, zone=zone, instance_type=kind, accelerators=gpu, use_spot=use_spot,
                 price_usd_per_hour=spot if use_spot else full, source="catalog", at=at)
        for infra, region, zone, kind, gpu, spot, full in PLACES
        for use_spot in (True, False)
    ]  # fmt: skip
    run = RunRecord(
        run_id=run_id, created_at=at, user=user, team=TEAMS[user], kind=rng.choice(["prod", "prod", "dev"]),
        config_path="config/runs/orders.yaml", config={"model_name_or_path": "m", "max_steps": ATTEMPTS * STEPS},
        config_sha256="c", data_sha256="d", infra="aws", prices=[vars(row) for row in rows],
    )  # fmt: skip
    _write(folder, keys.run, run)
    for attempt in range(1, ATTEMPTS + 1):
        at = _make_attempt(folder, keys, attempt, at + rng.uniform(30, 600), rows, rng)
    end = rng.choice(["completed"] * 18 + ["failed", "paused"])
    if end == "completed":
        certificate = Certificate(run_id=run_id, attempt=ATTEMPTS, step=ATTEMPTS * STEPS, weights_sha256="w", files={})
        _write(folder, keys.completed, certificate)
        return
    code = FAILED if end == "failed" else PAUSED
    mark = Mark(run_id=run_id, attempt=ATTEMPTS, at=at, reason=end, exit_code=code, step=ATTEMPTS * STEPS)
    _write(folder, keys.failed if end == "failed" else keys.paused, mark)


def _make_attempt(folder: Path, keys: Keys, attempt: int, at: float, rows: list[PriceRow], rng: random.Random) -> float:
    """Returns when it ended."""
    price = rng.choice([row for row in rows if row.use_spot])
    place = {"infra": price.infra, "region": price.region, "zone": price.zone}
    claimed_at = at + rng.uniform(40, 120)
    claim = AttemptRecord(run_id=keys.run_id, attempt=attempt, claimed_at=claimed_at, claim_id="c", **place)
    _write(folder, keys.attempt(attempt), claim)
    events, clock, first = [{"t": claimed_at, "event": "start"}], claimed_at + 20, (attempt - 1) * STEPS
    events.append({"t": claimed_at, "event": "phase", "phase": "load"})
    events.append({"t": clock, "event": "phase", "phase": "train"})
    for step in range(first + 1, first + STEPS + 1):
        clock += rng.uniform(80, 100)
        events.append({"t": clock, "event": "step", "step": step, "tokens": step * 1000, "data_wait_s": 0.1})
        if step % 10 == 0:
            events.append({"t": clock, "event": "log", "step": step, "loss": 3.0 / step})
    reason = "completed" if attempt == ATTEMPTS else "preempted"
    events.append({"t": clock + 3, "event": "commit", "step": first + STEPS})
    events.append({"t": clock + 4, "event": "end", "reason": reason, "exit_code": 0 if attempt == 3 else PREEMPTED})
    for part in range(PARTS):
        lines = events[part * len(events) // PARTS : (part + 1) * len(events) // PARTS]
        data = "".join(json.dumps(event) + "\n" for event in lines)
        _put(folder, keys.events(attempt, 0, part), data.encode())
    last = first + STEPS
    commit = Commit(run_id=keys.run_id, step=last, attempt=attempt, tokens=last * 1000, files={})
    _write(folder, keys.commit(attempt, last), commit)
    ended_at = clock + 30
    seconds = ended_at - at
    bill = Bill(
        run_id=keys.run_id, attempt=attempt, started_at=at, ended_at=ended_at, price=vars(price), paid_s=seconds,
        cost_usd=seconds / 3600 * price.price_usd_per_hour, end_reason=reason, instance_type=price.instance_type,
        accelerators=price.accelerators, use_spot=True, **place,
    )  # fmt: skip
    _write(folder, keys.bill(attempt), bill)
    return ended_at


def _write(folder: Path, key: str, record: Record) -> None:
    _put(folder, key, record.to_bytes())


def _put(folder: Path, key: str, data: bytes) -> None:
    """Not by the store: nothing here has to survive a crash, and fsync would take an hour."""
    path = folder / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


if __name__ == "__main__":
    make_runs(Path(sys.argv[1]), int(sys.argv[2]))
