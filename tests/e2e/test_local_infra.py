"""The local infrastructure: the contract of all infrastructures, and what only this one promises. Real processes.

The supervisor is in the test's process, see tests/local_machine.py. Tests of the supervisor's own process, and of verbs
that need one, have ``served``.
"""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import pytest

from drill.machine import command_of
from spotune.core.errors import InputError
from spotune.core.keys import Keys
from spotune.core.records import Commit
from spotune.core.store import Store
from spotune.launch.engine import Submission
from spotune.launch.local import engine
from spotune.launch.local.engine import LocalInfra
from spotune.launch.local.layout import MARKER, Layout
from spotune.launch.local.machine import is_live
from tests.contract.infra_contract import CERTIFY, DEAF, HEEDS, HOLD, SECOND_TIME, UP, WAIT, Bench, InfraContract
from tests.local_machine import LocalMachine
from tests.processes import end_processes_of, kill_tree, named, processes_of
from tests.waiting import LIMIT_S, until

HOUR_S = 3600.0


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


@pytest.fixture
def machine(home: Path) -> Iterator[LocalMachine]:
    machine = LocalMachine(home)
    yield machine
    machine.close()


@pytest.fixture
def bench(machine: LocalMachine, tmp_path: Path, workdir: Path) -> Bench:
    return Bench(
        machine.infra(os.environ),
        Store(f"file://{tmp_path}/bucket"),
        str(workdir),
        pause=machine.wait,
        move=machine.move,
        notice_s=HOUR_S,
    )


@pytest.fixture
def served(home: Path, tmp_path: Path, workdir: Path) -> Iterator[Bench]:
    """With a supervisor in a process of its own, as verbs start it."""
    yield Bench(LocalInfra(home, os.environ), Store(f"file://{tmp_path}/bucket"), str(workdir))
    end_processes_of(home)


def supervisors(home: Path) -> list[psutil.Process]:
    return [process for process in processes_of(home) if "spotune.launch.local.supervisor" in command_of(process)]


def node_of(machine: LocalMachine, run_id: str) -> psutil.Process:
    """The process that stands for the run's machine."""
    attempt = machine.queue.attempts(run_id)[-1]
    assert attempt.pid
    return psutil.Process(attempt.pid)


def commit(bench: Bench, run_id: str, step: int) -> None:
    record = Commit(run_id=run_id, step=step, attempt=1, files={})
    bench.store.create(Keys(run_id).commit(1, step), record.to_bytes())


class TestLocalInfra(InfraContract):
    """The contract, on this machine."""


def test_a_killed_supervisor_leaves_jobs_running_and_the_next_adopts_them(served: Bench, home: Path) -> None:
    served.submit("run-a", f"echo up; {HOLD}; {CERTIFY}")
    served.says("run-a", "up")
    (first,) = supervisors(home)
    first.kill()
    served.until(lambda: not engine.is_running(Layout(home)))
    assert named(home, "bash")
    served.infra = LocalInfra(home, os.environ)
    served.infra.jobs()  # any verb that needs it starts the next one
    served.until(lambda: [process for process in supervisors(home) if process != first])
    Path(served.workdir, "go").touch()
    job = served.end("run-a")
    assert (job.state, job.attempt) == ("SUCCEEDED", 1)


def test_a_job_that_ends_while_no_supervisor_watches_is_not_lost(bench: Bench, machine: LocalMachine) -> None:
    bench.submit("run-a", f"echo up; {HOLD}; {CERTIFY}")
    bench.says("run-a", "up")
    node = node_of(machine, "run-a")
    machine.lose_supervisor()
    Path(bench.workdir, "go").touch()
    until(lambda: not is_live(node))  # and nobody looks
    ended_at = time.time()
    machine.move(HOUR_S)
    assert bench.end("run-a").state == "SUCCEEDED"
    assert (bench.infra.history("run-a")[0].ended_at or 0) <= ended_at


def test_a_notice_lasts_as_long_as_it_says_whoever_watches(bench: Bench, machine: LocalMachine) -> None:
    bench.submit("run-a", f"{SECOND_TIME} [ $ended ] && {CERTIFY} && exit 0; {DEAF}")
    bench.comes_up("run-a")
    bench.infra.preempt("run-a", HOUR_S)
    machine.lose_supervisor()  # in the middle of it
    machine.move(HOUR_S / 2)
    machine.tick()
    assert node_of(machine, "run-a").is_running()
    assert bench.job("run-a").attempt == 1
    machine.move(HOUR_S / 2)
    assert bench.end("run-a").state == "SUCCEEDED"
    assert [row.end_reason for row in bench.infra.history("run-a")] == ["preempted", "exited"]


def test_a_vanished_machine_takes_everything_on_it_along(bench: Bench, machine: LocalMachine) -> None:
    runs_away = f"setsid bash -c 'trap \"\" TERM; touch away; {WAIT}' & "
    bench.submit("run-a", f"{SECOND_TIME} [ $ended ] && {CERTIFY} && exit 0; {runs_away} {DEAF}")
    bench.comes_up("run-a")
    bench.until(Path(bench.workdir, "away").exists)
    bench.until(lambda: len(named(machine.home, "sleep")) == 2)
    before = named(machine.home, "bash", "sleep")
    node_of(machine, "run-a").kill()
    job = bench.end("run-a")
    assert (job.state, job.attempt) == ("SUCCEEDED", 2)
    assert bench.infra.history("run-a")[0].end_reason == "lost"
    assert len(before) == 4
    assert not any(is_live(process) for process in before)


def test_a_killed_program_is_recovered_without_limit_but_slower_and_slower(bench: Bench, machine: LocalMachine) -> None:
    """How much slower: tests/unit/launch/test_supervisor.py."""
    bench.submit("run-a", "echo started; kill -9 $$")
    machine.moves_s = HOUR_S
    bench.says("run-a", "started", times=5)
    assert bench.infra.history("run-a")[0].exit_code == 137
    assert bench.job("run-a").state in ("RUNNING", "RECOVERING")


def test_progress_resets_the_slowing_down(bench: Bench, machine: LocalMachine) -> None:
    count = "n=$(cat n 2>/dev/null || echo 0); echo $((n + 1)) > n; echo started"
    bench.submit("run-a", f"{count}; until [ -e go$n ]; do sleep 0.05; done; kill -9 $$")
    for step in range(3):
        bench.says("run-a", "started", times=step + 1)
        commit(bench, "run-a", step + 1)
        Path(bench.workdir, f"go{step}").touch()
    bench.says("run-a", "started", times=4)
    job = machine.queue.job("run-a")
    assert job
    assert job.faults == 1


def test_what_a_run_leaves_behind_is_killed_with_its_machine(bench: Bench, home: Path) -> None:
    bench.submit("run-a", f"nohup sleep 3600 & setsid sleep 3600 & {HOLD}; {CERTIFY}")
    bench.until(lambda: len(named(home, "sleep")) >= 2)
    Path(bench.workdir, "go").touch()
    bench.end("run-a")
    assert named(home, "sleep") == []


def test_after_a_reboot_the_machine_is_lost_at_its_last_heartbeat(bench: Bench, machine: LocalMachine) -> None:
    bench.submit("run-a", f"{SECOND_TIME} [ $ended ] && {CERTIFY} && exit 0; {HEEDS}")
    bench.comes_up("run-a")
    node = node_of(machine, "run-a")
    machine.lose_supervisor()
    kill_tree(node)
    until(lambda: not is_live(node))
    machine.queue.update_attempt(machine.queue.attempts("run-a")[0], boot="the boot before")
    heartbeat = machine.layout.attempt("run-a", 1).heartbeat.stat().st_mtime
    machine.move(HOUR_S)
    assert bench.end("run-a").state == "SUCCEEDED"
    lost = bench.infra.history("run-a")[0]
    assert lost.end_reason == "lost"
    assert lost.ended_at == heartbeat


def test_cancel_leaves_no_process(bench: Bench, home: Path) -> None:
    bench.submit("run-a", f"trap 'exit 0' TERM; (setsid bash -c 'touch away; {WAIT}' &); {UP}; {WAIT}")
    bench.comes_up("run-a")
    bench.until(Path(bench.workdir, "away").exists)
    bench.infra.cancel("run-a")
    assert bench.job("run-a").state == "CANCELLED"
    assert processes_of(home) == []


def test_setup_runs_once_and_its_failure_is_a_failure(bench: Bench) -> None:
    bench.submit("run-a", f"{SECOND_TIME} [ $ended ] || exit 75; {CERTIFY}", setup="echo setting up")
    bench.end("run-a")
    assert list(bench.infra.logs("run-a", follow=False)).count("setting up") == 1
    bench.submit("run-b", "echo never", setup="exit 9")
    job = bench.end("run-b")
    assert (job.state, job.reason) == ("FAILED", "setup exited with code 9")


def test_planned_preemptions_fire_once_each(bench: Bench, machine: LocalMachine) -> None:
    status = 'echo "{\\"step\\": 40, \\"max_steps\\": 99}" > "$SPOTUNE_STATUS_FILE"'
    run = f"{SECOND_TIME} trap 'echo told; exit 75' TERM; [ $ended ] && {status}; echo up; {WAIT}"
    planned = ({"after_s": HOUR_S, "notice_s": 0.0}, {"at_step": 40.0, "notice_s": HOUR_S})
    bench.submit("run-a", run, preemptions=planned)
    bench.says("run-a", "up")
    for _ in range(3):
        machine.tick()
    assert bench.job("run-a").attempt == 1
    machine.move(HOUR_S + 60)  # once it runs
    bench.until(lambda: "up" in after(bench.log("run-a"), "[spotune] attempt 3"))
    job = bench.job("run-a")
    assert (job.step, job.max_steps) == (40, 99)
    assert bench.log("run-a").count("told") == 1
    machine.move(10 * HOUR_S)
    for _ in range(3):
        machine.tick()
    assert bench.job("run-a").attempt == 3


def after(lines: list[str], line: str) -> list[str]:
    return lines[lines.index(line) :] if line in lines else []


def test_secrets_reach_the_job_and_nothing_else(bench: Bench, machine: LocalMachine) -> None:
    run = f"echo $TOKEN | rev; echo up; {HOLD}; {CERTIFY}"
    bench.submit("run-a", run, secrets={"TOKEN": "drowssap-terces"})
    bench.says("run-a", "up")
    kept = machine.layout.environment("run-a")
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    machine.lose_supervisor()
    Path(bench.workdir, "go").touch()
    bench.end("run-a")
    assert "secret-password" in bench.log("run-a")
    assert not kept.exists()
    for path in machine.home.rglob("*"):
        assert not path.is_file() or b"drowssap-terces" not in path.read_bytes(), path


def test_a_secret_must_be_there_to_resume(bench: Bench) -> None:
    bench.submit("run-a", "exit 1", secrets={"TOKEN": "x"})
    bench.end("run-a")
    with pytest.raises(InputError, match="TOKEN"):
        bench.infra.resume("run-a")


def test_an_interactive_run_starts_beside_the_queue_and_is_not_recovered(bench: Bench) -> None:
    bench.submit("first", HEEDS)
    bench.says("first", "up")
    bench.submit("second", "exit 75", interactive=True)
    job = bench.end("second")
    assert (job.state, job.exit_code, job.attempt) == ("FAILED", 75, 1)
    assert bench.job("first").state == "RUNNING"


def test_slots(bench: Bench, machine: LocalMachine) -> None:
    bench.infra = machine.infra(os.environ, slots=2)
    for run_id in ("one", "two", "three"):
        bench.submit(run_id, HEEDS)
    bench.until(lambda: [job.state for job in bench.infra.jobs()][:2] == ["RUNNING", "RUNNING"])
    assert bench.job("three").state == "PENDING"


def test_each_job_has_its_own_gpu(tmp_path: Path, machine: LocalMachine, bench: Bench) -> None:
    listing = "0, GPU-a, NVIDIA L4, 23034\n1, GPU-b, NVIDIA L4, 23034\n"
    fake = tmp_path / "bin" / "nvidia-smi"
    fake.parent.mkdir()
    fake.write_text(f"#!/bin/sh\nprintf '{listing}'\n")
    fake.chmod(0o755)
    environ = {**os.environ, "PATH": f"{fake.parent}:{os.environ['PATH']}"}
    bench.infra = machine.infra(environ)
    one = {"accelerators": "L4:1"}
    for run_id in ("one", "two"):
        bench.submit(run_id, f"echo gpu $CUDA_VISIBLE_DEVICES of $SKYPILOT_NUM_GPUS_PER_NODE; {HEEDS}", resources=one)
    bench.says("one", "gpu 0 of 1")
    bench.says("two", "gpu 1 of 1")
    assert bench.infra.history("one")[0].accelerators == "L4:1"
    with pytest.raises(InputError, match="L4:8"):
        bench.submit("eight", "true", resources={"accelerators": "L4:8"})


def test_a_folder_that_is_gone_fails_the_run_and_not_the_supervisor(bench: Bench, tmp_path: Path) -> None:
    bench.submit("run-a", CERTIFY, workdir=str(tmp_path / "gone"))
    job = bench.end("run-a")
    assert job.state == "FAILED"
    assert "gone" in job.reason
    bench.submit("run-b", CERTIFY)
    assert bench.end("run-b").state == "SUCCEEDED"


def test_a_run_id_is_taken_once(bench: Bench) -> None:
    bench.submit("run-a", CERTIFY)
    with pytest.raises(InputError, match="--name: run-a is in this machine.s queue already"):
        bench.submit("run-a", CERTIFY)


def test_many_submit_at_once(served: Bench, home: Path) -> None:
    """Verbs of several terminals at the same time: every job is there, and there is one supervisor."""

    def add(number: int) -> None:
        task: dict[str, Any] = {"run": CERTIFY, "envs": {"SPOTUNE_BUCKET": served.store.url}}
        run_id = f"run-{number}"
        LocalInfra(home, os.environ).submit(Submission(run_id=run_id, task=task, workdir=served.workdir, user="x"))

    threads = [Thread(target=add, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    served.until(lambda: [job.state for job in served.infra.jobs()] == ["SUCCEEDED"] * 6)
    served.until(lambda: len(supervisors(home)) == 1)  # one too many may be on its way out


def test_submission_is_data(bench: Bench, machine: LocalMachine) -> None:
    """What the database keeps of a submission is readable JSON, for those who look into it."""
    bench.submit("run-a", CERTIFY)
    job = machine.queue.job("run-a")
    assert job
    assert json.dumps(job.task)


def test_a_bucket_far_away_is_asked_with_the_jobs_credentials(
    machine: LocalMachine, bench: Bench, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The supervisor has none: it is the job's environment that reaches the bucket."""
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    keys["AWS_ENDPOINT_URL"] = s3_server
    with monkeypatch.context() as here:
        for name, value in keys.items():
            here.setenv(name, value)
        store = Store(f"s3://spotune/{time.time_ns()}")
        store.write(Keys("run-b").completed, b"{}")
    bench.infra, bench.store = machine.infra({**os.environ, **keys}), store
    bench.submit("run-b", "exit 1")
    bench.until(lambda: bench.infra.jobs(["run-b"])[0].state == "SUCCEEDED")


def test_a_mark_that_cannot_be_read_is_one_all_the_same(bench: Bench) -> None:
    """Else the job would hold its slot for as long as nobody looks."""
    bench.store.write(Keys("run-a").failed, b"half a rec")
    bench.submit("run-a", "exit 1")
    job = bench.end("run-a")
    assert job.state == "FAILED"
    assert "failed.json" in job.reason


def test_a_verb_called_by_a_job_does_not_die_with_it(served: Bench, home: Path) -> None:
    """Its supervisor is nobody's part: it outlives the machine that it was started from."""
    served.infra = LocalInfra(home, {**os.environ, MARKER: "run-a/1/the-jobs-own"})
    served.submit("run-b", HEEDS)
    served.comes_up("run-b")
    (supervisor,) = supervisors(home)
    assert MARKER not in supervisor.environ()
    assert supervisor.ppid() != os.getpid()
    served.infra.cancel("run-b")
    assert served.job("run-b").state == "CANCELLED"


def test_a_supervisor_leaves_when_there_is_nothing_to_do(served: Bench, home: Path) -> None:
    """After how long: tests/unit/launch/test_supervisor.py."""
    served.submit("run-a", CERTIFY)
    served.end("run-a")
    for process in supervisors(home):
        process.send_signal(signal.SIGTERM)
    served.until(lambda: processes_of(home) == [])
    code = "import sys; from spotune.launch.local import supervisor as s; s.IDLE_S = 0.0; s.main(sys.argv[1:])"
    assert subprocess.run([sys.executable, "-c", code, str(home)], timeout=LIMIT_S, check=False).returncode == 0
    assert not engine.is_running(Layout(home))
