"""Pending extras, and the process that does an extra, with a fake worker. Whole runs: tests/e2e/test_extras.py."""

import os
import shlex
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from spotune.core.environment import WORKER
from spotune.core.keys import Keys
from spotune.core.protocol import EXTRAS, MERGE, OUTPUT, PUSH, ExtraJob, ExtraResult, answer_path, asked_for, write_json
from spotune.core.records import RunRecord
from spotune.core.store import Store
from spotune.guard.extras import TIMEOUT_S, ExtraWatch, pending_extras, run_extra
from spotune.launch.local.machine import send
from tests.clocks import Clock
from tests.script import FAKE_WORKER
from tests.unit.guard.attempts import RUN, make_context
from tests.waiting import until

KEYS = Keys("a-run")


def test_pending_is_what_is_asked_for_and_has_no_mark(local_store: Store) -> None:
    assert asked_for({"merge_adapter": "yes", "push_to_hub": "false"}) == (MERGE,)
    config = {"merge_adapter": True, "push_to_hub": True}
    run = RunRecord(
        run_id="a-run", created_at=0, user="u", config_path="c", config=config, config_sha256="", data_sha256=""
    )
    assert pending_extras(local_store, KEYS) is None
    local_store.write(KEYS.run, run.to_bytes())
    assert pending_extras(local_store, KEYS)[1:] == ((MERGE, PUSH),)  # type: ignore[index]
    local_store.create(KEYS.merge_completed, b"{}")
    assert pending_extras(local_store, KEYS)[1:] == ((PUSH,),)  # type: ignore[index]
    local_store.create(KEYS.pushed, b"{}")
    assert pending_extras(local_store, KEYS) is None


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """An attempt's folder with a result, and the environment that leads to a fake worker."""
    (tmp_path / OUTPUT).mkdir()
    write_json(tmp_path / EXTRAS, ExtraJob("a-run", 1, "", {}))
    return {**os.environ, WORKER: shlex.quote(str(FAKE_WORKER)), "FAKE_WORKER_DIR": str(tmp_path)}


def test_an_answer_of_an_earlier_try_does_not_count(tmp_path: Path, environ: dict[str, str]) -> None:
    write_json(answer_path(tmp_path, PUSH), ExtraResult(True))
    (tmp_path / "push").write_text("refused")
    assert run_extra(PUSH, tmp_path, {}, environ, time.sleep) == ExtraResult(False, "refused")


@pytest.fixture
def children() -> Callable[[], set[psutil.Process]]:
    """Looks for the processes that this test has started."""
    others = set(psutil.Process().children())
    return lambda: set(psutil.Process().children()) - others


def test_a_process_that_hangs_is_ended_after_an_hour(
    tmp_path: Path, environ: dict[str, str], children: Callable[[], set[psutil.Process]]
) -> None:
    clock = Clock(1000.0)
    (tmp_path / "push").write_text("hang")

    def wait(seconds: float) -> None:
        until((tmp_path / "asked").exists)
        clock.advance(60)

    answer = run_extra(PUSH, tmp_path, {}, environ, wait, clock=clock)
    assert answer == ExtraResult(False, f"not done after {TIMEOUT_S:.0f} s")
    assert clock() == 1000 + TIMEOUT_S + 60
    assert not children()


def test_a_process_that_vanishes_is_an_answer(
    tmp_path: Path, environ: dict[str, str], children: Callable[[], set[psutil.Process]]
) -> None:
    (tmp_path / "push").write_text("hang")

    def kill_when_asked(seconds: float) -> None:
        until((tmp_path / "asked").exists)
        send(children(), signal.SIGKILL)

    answer = run_extra(PUSH, tmp_path, {}, environ, kill_when_asked)
    assert answer == ExtraResult(False, "its process was killed by SIGKILL without a word")


def test_whatever_ends_the_wait_ends_the_process(
    tmp_path: Path, environ: dict[str, str], children: Callable[[], set[psutil.Process]]
) -> None:
    (tmp_path / "push").write_text("hang")

    def leave(seconds: float) -> None:
        until((tmp_path / "asked").exists)
        raise TimeoutError

    with pytest.raises(TimeoutError):
        run_extra(PUSH, tmp_path, {}, environ, leave)
    assert not children()


def test_a_process_that_hangs_is_ended_and_leaves_its_stacks(
    local_store: Store, tmp_path: Path, environ: dict[str, str]
) -> None:
    (tmp_path / "push").write_text("hang")
    context = make_context(local_store, tmp_path, patience_s=1200.0)
    context.folder.mkdir(parents=True)
    clock = Clock(1000.0)

    def wait(seconds: float) -> None:
        until((tmp_path / "asked").exists)  # it is up: what it does then takes no time of the clock's
        clock.advance(4.0)

    answer = run_extra(PUSH, tmp_path, {}, environ, wait, ExtraWatch(context, clock, clock).fault, clock=clock)
    place = f"{local_store.url}/{context.keys.stacks(1, 0)}"
    assert not answer.done
    assert answer.message.startswith("its process hangs: nothing done for 12")
    assert answer.message.endswith(f" s (limit 1200 s); stacks: {place}")
    assert b"threads, as the kernel sees them" in (local_store.read(context.keys.stacks(1, 0)) or b"")


def test_a_process_is_not_watched_where_the_watchdog_is_off(local_store: Store, tmp_path: Path) -> None:
    context = make_context(local_store, tmp_path, run=replace(RUN, stall_after="0"))
    clock = Clock(0.0)
    watch = ExtraWatch(context, clock, clock)
    for _ in range(2000):
        clock.advance(4.0)
        assert watch.fault(os.getpid()) == ""
