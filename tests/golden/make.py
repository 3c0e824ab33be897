"""Makes tests/golden/v<N>: a bucket, a SPOTUNE_HOME and a worker's folder, as the code of today writes them.

    PYTHONPATH=.:src:benchmarks .venv/bin/python -m tests.golden.make tests/golden/v2

Run it in a checkout, and only for a new folder: an old folder is what old versions wrote, and is never made again.
It takes about a minute. Guards, supervisor and verbs are real. The workers, the GPU and SkyPilot's answers are not.
Times and random ids are those of the day. The host's name, the boot id and process ids are replaced.
"""

import json
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml

from spotune.core.keys import Keys
from spotune.core.records import TerminalMarker
from spotune.launch.engine import JobStatus, PaidInterval
from spotune.launch.local.machine import boot_id
from spotune.launch.settings import Workspace
from spotune.launch.skypilot.clusters import book
from spotune.launch.skypilot.engine import Registry, RunEntry
from tests import guard_with_clock, guard_with_watchdog_clock
from tests.golden import worker
from tests.golden.kinds import kind_of, read_record
from tests.local_project import LocalProject
from tests.unit.launch.skypilot.test_booking import row
from tests.waiting import until

ROOT = Path("/tmp/spotune-golden")  # in the files, too
CHECKOUT = Path(__file__).parents[2]
CONFIG = {"max_steps": 8, "save_steps": 3, "logging_steps": 2}
SPOT_USD_PER_HOUR = 108.0
SETTINGS = {"team": "nlp", "local": {"prices": {"L4": {"on_demand": 288.0, "spot": SPOT_USD_PER_HOUR}}}}
NVIDIA_SMI = """\
#!/bin/sh
case "$*" in
  *uuid*) echo '0, GPU-0000, NVIDIA L4, 23034' ;;
  *-L*) echo 'GPU 0: NVIDIA L4 (UUID: GPU-0000)' ;;
  *) echo '87, 9216, 23034' ;;
esac
"""
SCHEMA = "PRAGMA user_version = {};\n"


class GoldenProject(LocalProject):
    """A project below ROOT, a git repository, on a machine with one GPU."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._make_machine(patch)
        super().__init__(ROOT / "project", patch, **CONFIG, use_peft=True)
        tools = self.folder / "tools"
        tools.mkdir()
        for module in (guard_with_clock, guard_with_watchdog_clock):
            shutil.copy(str(module.__file__), tools)
        auto = yaml.safe_load((self.folder / "run.yaml").read_text())
        del auto["save_steps"]
        (self.folder / "auto.yaml").write_text(yaml.safe_dump(auto))
        (self.folder / "config").mkdir()
        (self.folder / "config/spotune.yaml").write_text(yaml.safe_dump(SETTINGS))
        (self.folder / ".gitignore").write_text("home\ntold\ntasks\n")
        self._git("init", "-q", "-b", "main")
        self._git("add", ".")
        self._git("commit", "-q", "-m", "The project")
        (self.folder / "prepare.py").write_text("print('a file that is not committed')\n")

    def _make_machine(self, patch: pytest.MonkeyPatch) -> None:
        ROOT.mkdir()
        python, smi = ROOT / "bin/python", ROOT / "bin/nvidia-smi"
        python.parent.mkdir()
        path = f"{CHECKOUT / 'src'}:{CHECKOUT}"
        python.write_text(f'#!/bin/sh\nexport PYTHONPATH={path}\nexec {sys.executable} "$@"\n')
        smi.write_text(NVIDIA_SMI)
        shutil.copy(str(worker.__file__), ROOT / "bin/worker.py")
        for file in (python, smi):
            file.chmod(0o755)
        for name in set(os.environ) - {"PATH"}:
            patch.delenv(name)
        given = {
            "HOME": f"{ROOT}/ada",
            "SKYPILOT_API_SERVER_ENDPOINT": "http://127.0.0.1:9",  # starts none here
            "SPOTUNE_USER": "ada",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": path,
        }
        given |= {"PATH": f"{ROOT}/bin:{os.environ['PATH']}", "GOLDEN_TOKEN": "not-a-secret"}
        for name, value in given.items():
            patch.setenv(name, value)

    def _git(self, *words: str) -> None:
        who = {
            f"GIT_{one}_{what}": value
            for one in ("AUTHOR", "COMMITTER")
            for what, value in (("NAME", "Ada"), ("EMAIL", "ada@example.org"), ("DATE", "2026-01-01T00:00:00Z"))
        }
        subprocess.run(["git", *words], cwd=self.folder, env={**os.environ, **who}, check=True)

    def write_task(self, guard: str = "-m spotune.sft", **envs: str) -> None:
        run = f'while [ -e told/hold ]; do sleep 0.1; done; exec "$SPOTUNE_PYTHON" {guard} "$SPOTUNE_CONFIG"'
        mine = {"SPOTUNE_PYTHON": f"{ROOT}/bin/python", "SPOTUNE_WORKER": f"{ROOT}/bin/worker.py"}
        self.told.mkdir(exist_ok=True)
        task = {
            "setup": "true",
            "run": run,
            "envs": {**mine, "FAKE_WORKER_DIR": str(self.told), **envs},
            "resources": {"use_spot": True},
        }
        (self.folder / "tasks/train.yaml").write_text(json.dumps(task))

    def submit(self, run_id: str, *words: str, config: str = "run.yaml") -> None:
        self.machine.made_at = time.time()  # the clock of verbs, which stands still
        self.spotune("train", config, "--name", run_id, "--gpus", "L4:1", "-y", "-d", *words)

    def events(self, run_id: str) -> list[str]:
        keys = [key for key in self.store.keys(Keys(run_id).attempts) if "/events-" in key]
        return [json.loads(line)["event"] for key in keys for line in (self.store.read(key) or b"").splitlines()]


def make(target: Path) -> None:
    shutil.rmtree(ROOT, ignore_errors=True)
    with pytest.MonkeyPatch.context() as patch:
        project = GoldenProject(patch)
        try:
            for story in (finish, fail_and_revise, pause, stall_and_cancel):
                print(f"{story.__name__} …", flush=True)
                story(project, target)
            answers = ask(project)
            go_on(project)
            book_cluster(project)
            hand_to_skypilot(project)
            keep(project, target)
            (target / "answers.json").write_text(_text(answers))
        finally:
            project.machine.close()
    clean(target)
    (target / "expected.json").write_text(_text(expect(target / "bucket")))
    shutil.rmtree(ROOT)


def finish(project: GoldenProject, target: Path) -> None:
    """Completed, merged and pushed, after a machine that never claimed, and a notice."""
    project.tell("hold")
    project.submit("done", "--budget", "50", "--priority", "7", "--set", "merge_adapter=true", "--set",
                   "push_to_hub=true")  # fmt: skip
    wait_for_machine(project, "done", 1)
    project.spotune("preempt", "done", "--no-notice")
    wait_for_machine(project, "done", 2)
    (project.told / "hold").unlink()
    project.allow(4)
    project.wait_for_commit("done", 3)
    project.wait_for_step("done", 4)
    wait_for_event(project, "done", "gpu")
    wait_for_event(project, "done", "alive")
    project.spotune("preempt", "done", "--notice", "300s")
    project.wait_for_stop("done")
    project.tell("push", "hang")
    project.allow_all()
    wait(project, lambda: project.store.exists(Keys("done").merge_completed) and _extras(project))
    copy_worker(project.home / "work/done/node-0/0003", target / "worker/finished")
    (project.told / "push").unlink()
    assert project.end("done")["state"] == "SUCCEEDED"


def _extras(project: GoldenProject) -> bool:
    folder = project.home / "work/done/node-0/0003"
    return (folder / "answer-merge.json").exists() and (project.told / "asked").exists()


def fail_and_revise(project: GoldenProject, target: Path) -> None:
    """Fails; goes on with another config and other code, and fails for good."""
    project.tell("fault", json.dumps({"step": 5, "how": "failed"}))
    project.submit("failed")
    assert project.end("failed")["state"] == "FAILED"
    (project.folder / "prepare.py").write_text("print('changed since')\n")
    project.tell("fault", json.dumps({"step": 7, "how": "failed"}))
    project.spotune("resume", "failed", "-y", "--set", "learning_rate=2e-3", "--allow-config-change")
    assert project.end("failed")["state"] == "FAILED"


def pause(project: GoldenProject, target: Path) -> None:
    """Most of the budget is used up, then all of it. Saves as often as the scheduler says."""
    clock = project.folder / "clock"
    project.write_task("-P tools/guard_with_clock.py clock")
    project.allow(4)
    project.submit("paused", "--budget", "10", config="auto.yaml")
    project.wait_for_step("paused", 4)
    clock.write_text(str(9.2 / SPOT_USD_PER_HOUR * 3600))
    wait_for_event(project, "paused", "budget")
    clock.write_text("200000")
    project.wait_for_stop("paused")
    project.allow_all()
    assert project.end("paused")["state"] == "PAUSED"
    project.write_task()


def stall_and_cancel(project: GoldenProject, target: Path) -> None:
    """A rank hangs; the next machine is cancelled; the third, after a resume, is cancelled before it claims."""
    clock = project.folder / "clock"
    clock.write_text("0")
    project.write_task("-P tools/guard_with_watchdog_clock.py clock jumps")
    project.allow(4)
    project.submit("cancelled")
    project.wait_for_commit("cancelled", 3)
    project.wait_for_step("cancelled", 4)
    clock.write_text("100000")
    wait_for_event(project, "cancelled", "stall")
    clock.write_text("0")
    second = project.machine.layout.attempt("cancelled", 2)
    wait(project, lambda: second.read_status().get("step") == 4)

    def release() -> None:
        project.wait_for_stop("cancelled")
        project.allow_all()

    thread = Thread(target=release)
    thread.start()
    project.spotune("cancel", "cancelled", "-y")
    thread.join()
    project.tell("hold")
    project.spotune("resume", "cancelled", "-y")
    wait_for_machine(project, "cancelled", 3)
    project.spotune("cancel", "cancelled", "-y")
    (project.told / "hold").unlink()
    project.write_task()


def book_cluster(project: GoldenProject) -> None:
    """A dev cluster that was stopped, and started again, as SkyPilot's report has it."""
    workspace = Workspace.open(os.environ, project.folder)
    began = 1_767_225_600
    book(workspace, [row((began, began + 3600), (began + 7200, None), now=began + 9000)], print, lambda: began + 9000.0)


def hand_to_skypilot(project: GoldenProject) -> None:
    """What is kept of a run that was handed to SkyPilot, and has ended."""
    began = 1_767_225_600.0
    registry = Registry(project.home)
    entry = RunEntry(
        run_id="elsewhere",
        infra="slurm/lab/spot",
        bucket="s3://team/spotune",
        user="ada",
        priority=3,
        submitted_at=began,
        workdir=str(project.folder),
        task={"name": "elsewhere", "run": "make", "resources": {"infra": "slurm/lab/spot", "use_spot": True}},
        secrets=["GOLDEN_TOKEN"],
        preemptible=["lab/spot"],
    )
    registry.create(entry)
    registry.write(RunEntry(**{**asdict(entry), "jobs": [11]}))
    status = JobStatus(
        run_id="elsewhere",
        state="SUCCEEDED",
        priority=3,
        user="ada",
        infra="slurm/lab/spot",
        submitted_at=began,
        started_at=began + 60,
        ended_at=began + 660,
        attempt=1,
        step=8,
        max_steps=8,
        bucket="s3://team/spotune",
    )
    registry.settle(status)
    history = [
        PaidInterval(
            run_id="elsewhere",
            started_at=began + 30,
            ended_at=began + 660,
            infra="slurm",
            region="lab",
            zone="spot",
            instance_type="-",
            accelerators="L4:1",
            use_spot=True,
            end_reason="succeeded",
        )
    ]
    registry.keep_history("elsewhere", history)


RUNS = ("done", "failed", "paused", "cancelled")
REPORTED = ("done",)  # in full; the others' totals are enough


def ask(project: GoldenProject) -> dict[str, Any]:
    """What the verbs answer on runs that have ended; the bills are written on the way."""
    answers: dict[str, Any] = {}
    for run_id in RUNS:
        project.spotune("cost", run_id)
    for run_id in RUNS:
        if run_id in REPORTED:
            answers[f"cost {run_id}"] = project.report(run_id)
        answers[f"logs {run_id}"] = project.spotune("logs", run_id).stdout.splitlines()
    answers["cost"] = json.loads(project.spotune("cost", "--format", "json").stdout)
    answers["queue"] = json.loads(project.spotune("queue", "-a", "--format", "json").stdout)
    return answers


def go_on(project: GoldenProject) -> None:
    """A run under way, with a sealed checkpoint that is not committed yet, and a request that waits."""
    (project.folder / "held").mkdir()
    held = {"SPOTUNE_FAILPOINTS": "staged:1", "SPOTUNE_FAILPOINT_DIR": str(project.folder / "held")}
    project.write_task(**held)
    project.allow(4)
    plan = project.folder / "preemptions.jsonl"
    plan.write_text('{"after_s": 80000, "notice_s": 30}\n')
    project.submit("running", "--preemptions", str(plan), "--secret", "GOLDEN_TOKEN", "--priority", "-5",
                   "--set", "max_steps=20")  # fmt: skip
    folder = project.home / "work/running/node-0/0001"
    wait(project, lambda: list(folder.glob("sealed/*.json")))
    project.machine.queue.ask("running", "preempt", 30.0)


def keep(project: GoldenProject, target: Path) -> None:
    """Copies bucket, home and the worker's folder."""
    copy_worker(project.home / "work/running/node-0/0001", target / "worker/running")
    shutil.copytree(project.home / "bucket", target / "bucket")
    for run_id in (*RUNS[1:], "running"):  # the data of one run is enough
        shutil.rmtree(target / "bucket/runs" / run_id / "checkpoints", ignore_errors=True)
    for run_id in ("paused", "cancelled", "running"):
        shutil.rmtree(target / "bucket/runs" / run_id / "code")
    home, local = target / "home", project.home / "local"
    (home / "local/kept").mkdir(parents=True)
    for run_id in ("done", "running"):
        shutil.copy(local / "kept" / f"{run_id}.json", home / "local/kept")
    for run_id in (*RUNS, "running"):
        left_out = {"done": ["0001", "0002"], "running": []}.get(run_id, ["0*", "setup-*"])
        ignored = shutil.ignore_patterns(".*", *left_out)
        shutil.copytree(local / "jobs" / run_id, home / "local/jobs" / run_id, ignore=ignored)
    shutil.copytree(project.home / "skypilot/runs", home / "skypilot/runs", ignore=shutil.ignore_patterns(".*"))
    dump(project.home / "local/queue.db", home / "local/queue.sql")
    (index,) = (project.home / "cache").glob("cost-*.sqlite")
    dump(index, home / "cache/cost.sql")
    environment = home / "local/jobs/running/environment.json"
    kept = json.loads(environment.read_text())
    kept["environ"] = {name: kept["environ"][name] for name in ("HOME", "SPOTUNE_USER", "SPOTUNE_PYTHON")}
    environment.write_text(json.dumps(kept))


def expect(bucket: Path) -> dict[str, Any]:
    """Every field of the last record of each kind, as it is read today."""
    expected: dict[Any, tuple[str, Any]] = {}
    for path in sorted(path for path in bucket.rglob("*") if path.is_file()):
        key = path.relative_to(bucket).as_posix()
        if kind := kind_of(key):
            name = path.name if kind is TerminalMarker else "revision" if "/revisions/" in key else ""
            expected[kind, name] = key, asdict(read_record(key, path.read_bytes()))
    return {key: values for key, values in expected.values() if not key.endswith("/run.json")}


def copy_worker(folder: Path, target: Path) -> None:
    """What guard and worker say to each other; the checkpoints' data is left out."""
    shutil.copytree(
        folder, target, ignore=shutil.ignore_patterns(".*", "model", "trainer", "output", "merged", "events-*")
    )


def dump(database: Path, target: Path) -> None:
    """A SQLite file as text, with its version."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(database)) as connection:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        target.write_text(SCHEMA.format(version) + "\n".join(connection.iterdump()) + "\n")


def clean(target: Path) -> None:
    """Puts neutral words for what is of this machine alone."""
    for path in (path for path in target.rglob("*") if path.is_file()):
        data = path.read_bytes()
        for word, neutral in (
            (socket.gethostname(), "machine-1"),
            (boot_id(), "0" * 8 + "-0000-4000-8000-" + "0" * 12),
        ):
            data = re.sub(rf'(["\' ]){re.escape(word)}(["\' ,])'.encode(), rf"\g<1>{neutral}\g<2>".encode(), data)
        path.write_bytes(data)
    left = subprocess.run(["grep", "-rlE", f"{CHECKOUT}|{Path.home()}/", str(target)], capture_output=True, text=True)
    assert not left.stdout, left.stdout


def wait(project: GoldenProject, seen: Any) -> None:
    def look() -> Any:
        project.machine.wait()
        return seen()

    until(look, lambda: project.machine.queue.jobs())


def wait_for_event(project: GoldenProject, run_id: str, kind: str) -> None:
    wait(project, lambda: kind in project.events(run_id))


def wait_for_machine(project: GoldenProject, run_id: str, attempt: int) -> None:
    def is_running() -> bool:
        found = project.machine.queue.attempts(run_id)
        return len(found) == attempt and found[-1].running_at is not None

    wait(project, is_running)


def _text(value: dict[str, Any]) -> str:
    """JSON with a line for each answer."""
    lines = [f"{json.dumps(name)}: {json.dumps(value[name], sort_keys=True)}" for name in sorted(value)]
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    if (folder := Path(sys.argv[1]).absolute()).exists():
        sys.exit(f"{folder} is there already: what an old version wrote is never made again")
    began = time.time()
    make(folder)
    print(f"{folder}: {sum(path.stat().st_size for path in folder.rglob('*') if path.is_file())} bytes,"
          f" {time.time() - began:.0f} s")  # fmt: skip
