"""The local infrastructure: the contract of all infrastructures, and what only this one promises. Real processes."""

import json
import os
import signal
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from drill.machine import command_of
from spotune.contracts.errors import InputError
from spotune.contracts.keys import Keys
from spotune.contracts.records import Commit
from spotune.contracts.store import Store
from spotune.launch.infra import Submission
from spotune.launch.local.infra import LocalInfra
from spotune.launch.local.processes import is_live
from tests.contract.infra_contract import CERTIFY, DEAF, HEEDS, SECOND_TIME, WAIT, Bench, InfraContract
from tests.processes import end_processes_of, kill_tree, named, processes_of


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def bench(home: Path, tmp_path: Path) -> Iterator[Bench]:
    workdir = tmp_path / "work"
    workdir.mkdir()
    bench = Bench(LocalInfra(home, dict(os.environ)), Store(f"file://{tmp_path}/bucket"), str(workdir))
    yield bench
    for job in bench.infra.jobs():
        bench.infra.cancel(job.run_id)
    end_processes_of(home)


def local(bench: Bench) -> LocalInfra:
    assert isinstance(bench.infra, LocalInfra)
    return bench.infra


def stop_supervisor(bench: Bench, number: signal.Signals = signal.SIGKILL) -> None:
    pid = local(bench).supervisor_pid()
    if pid:
        os.kill(pid, number)
        bench.until(lambda: local(bench).supervisor_pid() != pid)


def node_of(bench: Bench, run_id: str) -> psutil.Process:
    """The process that stands for the run's machine."""
    attempt = local(bench)._queue.attempts(run_id)[-1]
    assert attempt.pid
    return psutil.Process(attempt.pid)


def commit(bench: Bench, run_id: str, step: int) -> None:
    record = Commit(run_id=run_id, step=step, attempt=1, files={})
    bench.store.create(Keys(run_id).commit(1, step), record.to_bytes())


class TestLocalInfra(InfraContract):
    """The contract, on this machine."""


def test_a_killed_supervisor_leaves_jobs_running_and_the_next_adopts_them(bench: Bench) -> None:
    bench.submit("run-a", f"echo up; while [ ! -e go ]; do sleep 0.05; done; {CERTIFY}")
    bench.says("run-a", "up")
    first, node = local(bench).supervisor_pid(), node_of(bench, "run-a")
    stop_supervisor(bench)
    assert node.is_running()
    bench.infra = LocalInfra(local(bench).layout.home, dict(os.environ))
    bench.infra.jobs()  # any verb that needs it starts the next one
    bench.until(lambda: local(bench).supervisor_pid() not in (None, first))
    Path(bench.workdir, "go").touch()
    job = bench.end("run-a")
    assert (job.state, job.attempt) == ("SUCCEEDED", 1)


def test_a_job_that_ends_while_no_supervisor_watches_is_not_lost(bench: Bench) -> None:
    bench.submit("run-a", f"echo up; while [ ! -e go ]; do sleep 0.05; done; {CERTIFY}")
    bench.says("run-a", "up")
    stop_supervisor(bench)
    Path(bench.workdir, "go").touch()
    bench.until(lambda: (local(bench).layout.attempt("run-a", 1).exit).exists())
    ended_at = time.time()
    time.sleep(0.5)
    assert bench.end("run-a").state == "SUCCEEDED"
    assert (bench.infra.history("run-a")[0].ended_at or 0) <= ended_at


def test_a_preemption_goes_on_when_the_supervisor_is_killed_in_the_middle(bench: Bench) -> None:
    bench.submit("run-a", f"{SECOND_TIME} [ $ended ] && {CERTIFY} && exit 0; {DEAF}")
    bench.says("run-a", "up")
    bench.infra.preempt("run-a", 2)
    stop_supervisor(bench)
    assert bench.end("run-a").state == "SUCCEEDED"
    assert bench.infra.history("run-a")[0].end_reason == "preempted"


def test_a_vanished_machine_takes_everything_on_it_along(bench: Bench) -> None:
    runs_away = "setsid bash -c 'sleep 300 & wait' & "
    bench.submit("run-a", f"{SECOND_TIME} [ $ended ] && {CERTIFY} && exit 0; {runs_away} {DEAF}")
    bench.says("run-a", "up")
    before: list[psutil.Process] = []
    deadline = time.monotonic() + 300
    while len(before) < 3:  # the one that runs away may start a moment after the other has said that it is up
        assert time.monotonic() < deadline, before
        before = named(local(bench).layout.home, "bash", "sleep")
    node_of(bench, "run-a").kill()
    job = bench.end("run-a")
    assert (job.state, job.attempt) == ("SUCCEEDED", 2)
    assert bench.infra.history("run-a")[0].end_reason == "lost"
    assert not any(is_live(process) for process in before)


def test_a_killed_program_is_recovered_without_limit_but_slower_and_slower(bench: Bench) -> None:
    bench.submit("run-a", "echo started; kill -9 $$")
    bench.says("run-a", "started", times=3)  # at once, then after 1 s
    rows = bench.infra.history("run-a")
    assert rows[2].started_at - (rows[1].ended_at or 0) >= 1
    assert rows[0].exit_code == 137
    assert bench.job("run-a").state in ("RUNNING", "RECOVERING")


def test_progress_resets_the_slowing_down(bench: Bench) -> None:
    count = "n=$(cat n 2>/dev/null || echo 0); echo $((n + 1)) > n; echo started"
    bench.submit("run-a", f"{count}; while [ ! -e go$n ]; do sleep 0.05; done; kill -9 $$")
    for step in range(3):
        bench.says("run-a", "started", times=step + 1)
        commit(bench, "run-a", step + 1)
        Path(bench.workdir, f"go{step}").touch()
    bench.says("run-a", "started", times=4)
    job = local(bench)._queue.job("run-a")
    assert job
    assert job.faults == 1


def test_what_a_run_leaves_behind_is_killed_with_its_machine(bench: Bench) -> None:
    bench.submit("run-a", f"nohup sleep 300 & setsid sleep 300 & {CERTIFY}")
    bench.end("run-a")
    assert named(local(bench).layout.home, "sleep") == []


def test_after_a_reboot_the_machine_is_lost_at_its_last_heartbeat(bench: Bench) -> None:
    bench.submit("run-a", f"{SECOND_TIME} [ $ended ] && {CERTIFY} && exit 0; {HEEDS}")
    bench.says("run-a", "up")
    node = node_of(bench, "run-a")
    stop_supervisor(bench)
    kill_tree(node)
    queue = local(bench)._queue
    queue.update_attempt(queue.attempts("run-a")[0], boot="the boot before")
    heartbeat = local(bench).layout.attempt("run-a", 1).heartbeat.stat().st_mtime
    time.sleep(1.2)
    assert bench.end("run-a").state == "SUCCEEDED"
    lost = bench.infra.history("run-a")[0]
    assert lost.end_reason == "lost"
    assert lost.ended_at == pytest.approx(heartbeat, abs=0.01)


def test_cancel_leaves_no_process(bench: Bench) -> None:
    bench.submit("run-a", f"trap 'exit 0' TERM; (setsid bash -c '{WAIT}' &); echo up; {WAIT}")
    bench.says("run-a", "up")
    bench.infra.cancel("run-a")
    assert bench.job("run-a").state == "CANCELLED"
    left = [process for process in processes_of(local(bench).layout.home) if "supervisor" not in command_of(process)]
    assert not any(is_live(process) for process in left)


def test_setup_runs_once_and_its_failure_is_a_failure(bench: Bench) -> None:
    bench.submit("run-a", f"{SECOND_TIME} [ $ended ] || exit 75; {CERTIFY}", setup="echo setting up")
    bench.end("run-a")
    assert list(bench.infra.logs("run-a", follow=False)).count("setting up") == 1
    bench.submit("run-b", "echo never", setup="exit 9")
    job = bench.end("run-b")
    assert (job.state, job.reason) == ("FAILED", "setup exited with code 9")


def test_planned_preemptions_fire_once_each(bench: Bench) -> None:
    status = 'echo "{\\"step\\": 40, \\"max_steps\\": 99}" > "$SPOTUNE_STATUS_FILE"'
    run = f"trap 'echo told; exit 75' TERM; echo up; [ -e done3 ] && {CERTIFY} && exit 0; {status}; {WAIT}"
    planned = ({"after_s": 0.3, "notice_s": 0.0}, {"at_step": 40.0, "notice_s": 9.0})
    bench.submit("run-a", run, preemptions=planned)
    third = "[spotune] attempt 3"  # the first may be gone before it says that it is up
    bench.until(lambda: third in (lines := bench.log("run-a")) and "up" in lines[lines.index(third) :])
    job = bench.job("run-a")
    assert (job.step, job.max_steps) == (40, 99)
    lines = list(bench.infra.logs("run-a", follow=False))
    assert lines.count("told") == 1
    time.sleep(0.6)
    assert bench.job("run-a").attempt == 3


def test_secrets_reach_the_job_and_nothing_else(bench: Bench, home: Path) -> None:
    run = f"echo $TOKEN | rev; echo up; while [ ! -e go ]; do sleep 0.05; done; {CERTIFY}"
    bench.submit("run-a", run, secrets={"TOKEN": "drowssap-terces"})
    bench.says("run-a", "up")
    kept = local(bench).layout.environment("run-a")
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    stop_supervisor(bench)
    Path(bench.workdir, "go").touch()
    bench.end("run-a")
    assert "secret-password" in list(bench.infra.logs("run-a", follow=False))
    bench.until(lambda: not kept.exists())
    for path in home.rglob("*"):
        assert not path.is_file() or b"drowssap-terces" not in path.read_bytes(), path


def test_a_secret_must_be_there_to_resume(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_slots(tmp_path: Path, home: Path, bench: Bench) -> None:
    bench.infra = LocalInfra(home, dict(os.environ), slots=2)
    for run_id in ("one", "two", "three"):
        bench.submit(run_id, HEEDS)
    bench.says("two", "up")
    bench.until(lambda: [job.state for job in bench.infra.jobs()][:2] == ["RUNNING", "RUNNING"])
    assert bench.job("three").state == "PENDING"


def test_each_job_has_its_own_gpu(tmp_path: Path, home: Path, bench: Bench) -> None:
    listing = "0, GPU-a, NVIDIA L4, 23034\n1, GPU-b, NVIDIA L4, 23034\n"
    fake = tmp_path / "bin" / "nvidia-smi"
    fake.parent.mkdir()
    fake.write_text(f"#!/bin/sh\nprintf '{listing}'\n")
    fake.chmod(0o755)
    environ = {**os.environ, "PATH": f"{fake.parent}:{os.environ['PATH']}"}
    bench.infra = LocalInfra(home, environ)
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


def test_many_submit_at_once(bench: Bench, home: Path) -> None:
    """Verbs of several terminals at the same time: every job is there, and there is one supervisor."""
    import threading

    def add(number: int) -> None:
        task: dict[str, Any] = {"run": CERTIFY, "envs": {"SPOTUNE_BUCKET": bench.store.url}}
        run_id = f"run-{number}"
        LocalInfra(home, dict(os.environ)).submit(Submission(run_id=run_id, task=task, workdir=bench.workdir, user="x"))

    threads = [threading.Thread(target=add, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    bench.until(lambda: [job.state for job in bench.infra.jobs()] == ["SUCCEEDED"] * 6)
    assert len([one for one in processes_of(home) if "spotune.launch.local.supervisor" in command_of(one)]) == 1


def test_the_log_never_tears_a_character(bench: Bench) -> None:
    bench.submit("run-a", f"printf '\\303'; sleep 0.4; printf '\\244\\n'; {CERTIFY}")
    assert "ä" in list(bench.infra.logs("run-a", follow=True))


def test_submission_is_data(bench: Bench) -> None:
    """What the database keeps of a submission is readable JSON, for those who look into it."""
    bench.submit("run-a", CERTIFY)
    job = local(bench)._queue.job("run-a")
    assert job
    assert json.dumps(job.task)


def test_a_bucket_far_away_is_asked_with_the_jobs_credentials(
    home: Path, bench: Bench, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The supervisor was started without them: it is the job's environment that reaches the bucket."""
    bench.submit("first", CERTIFY)
    bench.end("first")
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    environ = {**os.environ, **keys, "AWS_ENDPOINT_URL": s3_server}
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    bench.infra, bench.store = LocalInfra(home, environ), Store(f"s3://spotune/{time.time_ns()}")
    bench.store.write(Keys("run-b").completed, b"{}")
    bench.submit("run-b", "exit 1")
    assert bench.end("run-b").state == "SUCCEEDED"


def test_a_mark_that_cannot_be_read_is_said_and_not_guessed(bench: Bench) -> None:
    bench.store.write(Keys("run-a").failed, b"half a rec")
    bench.submit("run-a", "exit 1")
    bench.until(lambda: "waiting for its bucket" in bench.job("run-a").reason)
    bench.store.delete([Keys("run-a").failed])
    assert bench.end("run-a").state == "FAILED"


def test_a_verb_called_by_a_job_does_not_die_with_it(bench: Bench, home: Path) -> None:
    """Its supervisor is nobody's part: it outlives the machine that it was started from."""
    bench.submit("run-a", f"echo up; {DEAF}")
    bench.says("run-a", "up")
    marker = local(bench)._queue.attempts("run-a")[0].marker
    stop_supervisor(bench)
    bench.infra = LocalInfra(home, {**os.environ, "SPOTUNE_MACHINE": marker})
    bench.infra.cancel("run-a")
    assert bench.job("run-a").state == "CANCELLED"
