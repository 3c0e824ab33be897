"""Any value in any field of any record: no verb and no part of the guard ends with a traceback."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spotune.cli import main
from spotune.core.errors import SpotuneError
from spotune.core.keys import Keys
from spotune.core.records import (
    AttemptRecord,
    Bill,
    Certificate,
    ClusterRecord,
    Commit,
    PriceRow,
    Progress,
    Record,
    RunRecord,
    TerminalMarker,
)
from spotune.core.revisions import record_history
from spotune.core.store import Store
from spotune.guard.attempt import make_job
from spotune.guard.budget import _earlier_usd
from spotune.guard.checkpoints import Retention
from spotune.guard.claim import _check_config, claim_attempt, earlier_uptimes, standing_verdict
from spotune.guard.extras import surviving_logs
from spotune.guard.finish import fetch_result
from spotune.guard.journal import Node
from spotune.guard.restore import is_second_fault, last_event, newest_commit, restore
from spotune.launch.local.programs import probe
from tests.commands import cli_runner
from tests.hostile import changed, values
from tests.unit.guard.attempts import make_context

T = 1_700_000_000.0
KEYS = Keys("run-a")
FILES = {"scheduler.pt": {"size": 5, "sha256": "0" * 64}}
PRICE = {"infra": "aws", "use_spot": True, "price_usd_per_hour": 1.0, "source": "catalog"}
RUN = RunRecord(
    run_id="run-a", created_at=T, user="ada", config_path="c.yaml", config={"max_steps": 8, "learning_rate": 0.1},
    config_sha256="c", data_sha256="d", prices=[PRICE], data_files=[{"url": "a", "size": 1}], budget_usd=5.0,
    code={"commit": "abc", "dirty": False},
)  # fmt: skip
RECORDS: dict[str, Record] = {
    KEYS.run: RUN,
    KEYS.revision(1): RunRecord(**{**vars(RUN), "revision": 1, "revised_at": T}),
    KEYS.attempt(1): AttemptRecord(run_id="run-a", attempt=1, claimed_at=T, claim_id="x", spells_s=[1.0]),
    KEYS.bill(1): Bill(run_id="run-a", attempt=1, started_at=T, ended_at=T + 60, price=PRICE),
    KEYS.lost_bill(T, T + 9): Bill(run_id="run-a", attempt=0, started_at=T, ended_at=T + 9, price=PRICE),
    KEYS.commit(1, 5): Commit(run_id="run-a", step=5, attempt=1, files=FILES, saving={"stall_s": 1.0}),
    KEYS.completed: Certificate(run_id="run-a", attempt=1, step=8, weights_sha256="w", files=FILES),
    KEYS.progress: Progress(run_id="run-a", attempt=1, step=5, loss=1.0, at=T),
    KEYS.failed: TerminalMarker(run_id="run-a", attempt=1, at=T, reason="why", exit_code=1, versions=["a 1 -> 2"]),
    KEYS.paused: TerminalMarker(run_id="run-a", attempt=1, at=T, reason="why", exit_code=76),
    KEYS.cancelled: TerminalMarker(run_id="run-a", attempt=1, at=T, reason="why", exit_code=1),
    f"clusters/dev-{int(T)}.json": ClusterRecord(
        name="dev", cluster_hash="h", launched_at=T, owner="ada", price=PRICE, spans=[[T, T + 5]], updated_at=T + 9
    ),
}
EVENT = {"t": T, "event": "step", "step": 1, "tokens": 9, "phase": "train", "reason": "failed", "exit_code": 75}


@st.composite
def spoiled(draw: st.DrawFn) -> tuple[str, bytes]:
    """A key, and its record with another value somewhere: in a field, or deeper."""
    key = draw(st.sampled_from(sorted(RECORDS)))
    return key, json.dumps(draw(changed(json.loads(RECORDS[key].to_bytes())))).encode()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.chdir(tmp_path)
    store = Store(f"file://{tmp_path}/home/bucket")
    for key, record in RECORDS.items():
        store.write(key, record.to_bytes())
    lines = [EVENT, {**EVENT, "event": "log", "loss": 1.0}, {**EVENT, "event": "end"}]
    store.write(KEYS.events(1, 0, 0), "\n".join(map(json.dumps, lines)).encode())
    return store


def spotune(*arguments: str) -> Result:
    result = cli_runner().invoke(main, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    assert result.exit_code in (0, 1, 2, 3), result.output
    assert "Traceback" not in result.output + result.stderr
    return result


VERBS = [
    ("queue", "-a", "--format", "json"), ("queue", "-a"), ("cost", "run-a", "--format", "json"),
    ("cost", "--since", "9999d"), ("cost", "--since", "9999d", "--format", "focus"),
    ("cost", "--since", "9999d", "--by", "user"), ("cost", "--since", "9999d", "--clusters"), ("resume", "run-a"),
    ("cancel", "run-a", "-y"), ("logs", "run-a"),
]  # fmt: skip
SETTINGS = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def put_back(store: Store, marks: tuple[str, ...]) -> None:
    """All records as they were; of the marks and the certificate those that are named."""
    for key, record in RECORDS.items():
        store.write(key, record.to_bytes())
    store.delete({KEYS.completed, KEYS.failed, KEYS.paused, KEYS.cancelled} - set(marks))


@SETTINGS
@given(spoil=spoiled(), verb=st.sampled_from(VERBS))
def test_no_verb_ends_with_a_traceback(world: Store, spoil: tuple[str, bytes], verb: tuple[str, ...]) -> None:
    put_back(world, (spoil[0],))
    world.write(*spoil)
    spotune(*verb)


def parts_of_the_guard(store: Store, folder: Path) -> dict[str, Callable[[], object]]:
    """What an attempt does with the bucket's records."""

    def certificate() -> None:
        data = store.read(KEYS.completed)
        fetch_result(store, KEYS, Certificate.from_bytes(data or b"", KEYS.completed), folder / "result")

    def run() -> RunRecord:
        return record_history(store, KEYS)[-1]

    return {
        "verdict": lambda: standing_verdict(store, KEYS),
        "probe": lambda: probe(store.url, "run-a"),
        "claim": lambda: claim_attempt(store, KEYS, Node.read({})),
        "spells": lambda: earlier_uptimes(store, KEYS, 1),
        "last event": lambda: last_event(store, KEYS, 1),
        "second fault": lambda: is_second_fault(store, KEYS, 2),
        "config": lambda: _check_config(run()),
        "job": lambda: make_job(make_context(store, folder, 2, run()), newest_commit(store, KEYS), [run()]),
        "budget": lambda: _earlier_usd(store, KEYS, run(), 2, 1.0),
        "restore": lambda: restore(store, KEYS, folder / "trainer"),
        "retention": lambda: Retention(store, KEYS, 2, keep_every=2).tidy(),
        "logs": lambda: surviving_logs(store, KEYS),
        "result": certificate,
    }


@SETTINGS
@given(spoil=spoiled())
def test_no_part_of_the_guard_ends_with_a_traceback(world: Store, spoil: tuple[str, bytes], tmp_path: Path) -> None:
    put_back(world, (spoil[0],))
    world.write(*spoil)
    for part in parts_of_the_guard(world, tmp_path / "machine").values():
        with suppress(SpotuneError):
            part()


@pytest.mark.slow
@SETTINGS
@given(name=st.sampled_from(sorted(EVENT)), value=values, verb=st.sampled_from(VERBS[:6]))
def test_nor_of_an_event(world: Store, name: str, value: Any, verb: tuple[str, ...], tmp_path: Path) -> None:
    put_back(world, ())
    world.write(KEYS.events(1, 0, 1), json.dumps({**EVENT, name: value}).encode())
    spotune(*verb)
    for part in ("claim", "spells", "last event", "second fault", "budget", "logs"):
        parts_of_the_guard(world, tmp_path / "machine")[part]()


@given(value=values)
def test_a_price_is_a_price_or_a_bad_record(value: Any) -> None:
    for field in fields(PriceRow):
        with suppress(ValueError):
            assert PriceRow.from_dict({**PRICE, field.name: value}).price_usd_per_hour >= 0
