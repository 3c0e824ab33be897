"""Tasks, settings, GPUs, preemptions, prices: the launcher's small pure parts."""

import datetime
import fcntl
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from spotune.core import io
from spotune.core.errors import AlreadyExists, InfraError, InputError
from spotune.core.keys import Keys
from spotune.core.records import Commit, Progress, TerminalMarker
from spotune.core.store import Store
from spotune.launch import task as tasks
from spotune.launch.engine import Submission
from spotune.launch.local import layout as local_layout
from spotune.launch.local.layout import LocalFolders
from spotune.launch.local.machine import Identity, boot_id, keep_environment, kept_environment, members
from spotune.launch.local.programs import probe
from spotune.launch.local.queue import Queue
from spotune.launch.plan import local_prices
from spotune.launch.settings import load_settings
from spotune.launch.skypilot.engine import Registry, RunEntry
from spotune.launch.task import Demand, Resources, demand_of, due, fill_in, load_task
from tests.filesystems import file_system, remounted

ROOT = Path(__file__).parents[3]


def test_the_train_task_is_plain_skypilot(tmp_path: Path) -> None:
    path, task = load_task(tmp_path)
    assert path == ROOT / "tasks/train.yaml"
    assert set(task) <= {"name", "workdir", "resources", "envs", "setup", "run", "num_nodes", "config"}
    demand = demand_of(task)
    assert demand.recover_codes == (75,)
    assert demand.use_spot
    assert "sky jobs launch" in path.read_text().split("\n\n")[0]


def test_a_project_has_its_own_task(tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/train.yaml").write_text("run: echo mine\n")
    assert load_task(tmp_path)[1]["run"] == "echo mine"


@pytest.mark.parametrize(
    ("resources", "gpu", "count"),
    [
        ({}, "", 0),
        ({"accelerators": "L4"}, "L4", 1),
        ({"accelerators": "A100-80GB:8"}, "A100-80GB", 8),
        ({"accelerators": {"L4": 2, "A10G": 1}}, "L4", 2),
        ({"accelerators": ["H100:4", "H200:4"]}, "H100", 4),
        ({"any_of": [{"accelerators": "T4:1"}, {"accelerators": "L4:1"}]}, "T4", 1),
        ({"ordered": [{"accelerators": {"L40S": None}}]}, "L40S", 1),
    ],
)
def test_demand(resources: dict[str, object], gpu: str, count: int) -> None:
    demand = demand_of({"run": "x", "resources": resources})
    assert (demand.gpu, demand.gpus) == (gpu, count)


def test_filling_in_leaves_the_original_alone() -> None:
    task = {"run": "x", "envs": {"A": 1, "B": None}, "resources": {"any_of": [{"accelerators": "T4:1"}], "cpus": 4}}
    before = yaml.safe_dump(task)
    filled = fill_in(task, {"A": "2"}, Resources(gpus="L4:1", use_spot=False, priority=3, num_nodes=2), "run-a")
    assert yaml.safe_dump(task) == before
    assert filled["envs"] == {"A": "2", "B": ""}
    assert filled["resources"] == {"cpus": 4, "accelerators": "L4:1", "use_spot": False, "priority": 3}
    assert (filled["name"], filled["num_nodes"]) == ("run-a", 2)


def test_skypilots_list_of_secrets(tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    task = tmp_path / "tasks/train.yaml"
    task.write_text("run: x\nsecrets: ['secrets:HF_TOKEN', 'secrets:team.KEY']\n")
    assert load_task(tmp_path)[1]["secrets"] == {"secrets:HF_TOKEN": None, "secrets:team.KEY": None}
    task.write_text("run: x\nsecrets: [HF_TOKEN]\n")
    with pytest.raises(InputError, match=r"secrets: 'HF_TOKEN' does not name a secret \(- secrets:NAME"):
        load_task(tmp_path)


def test_flags_hold_for_each_alternative() -> None:
    """In SkyPilot an entry's words win over those above it."""
    here, there = {"infra": "aws", "accelerators": "L4:1", "use_spot": True}, {"infra": "gcp", "instance_type": "g2"}
    task = {"run": "x", "resources": {"use_spot": False, "any_of": [here, there, {"infra": "gcp", "cpus": 4}]}}
    assert demand_of(task).use_spot
    flags = Resources(gpus="H100:1", use_spot=False, priority=3)
    filled = fill_in(task, {}, flags, "run-a")
    assert filled["resources"] == {
        "accelerators": "H100:1", "use_spot": False, "priority": 3,
        "any_of": [{"infra": "aws"}, {"infra": "gcp"}, {"infra": "gcp", "cpus": 4}],
    }  # fmt: skip
    assert not demand_of(filled).use_spot
    ordered = {"run": "x", "resources": {"ordered": [{"use_spot": True}, {"use_spot": False}]}}
    assert fill_in(ordered, {}, Resources(use_spot=True), "run-a")["resources"] == {"use_spot": True}
    assert demand_of(ordered).use_spot


def test_shipped_settings_and_their_overlay(tmp_path: Path) -> None:
    shipped = load_settings(tmp_path, tmp_path / "home")
    assert shipped.infra == "local"
    assert shipped.local.prices["cpu"].spot < shipped.local.prices["cpu"].on_demand
    (tmp_path / "home").mkdir()
    (tmp_path / "home/config.yaml").write_text("team: nlp\nlocal: {slots: 3, prices: {L4: {on_demand: 9, spot: 8}}}\n")
    mine = load_settings(tmp_path, tmp_path / "home")
    assert (mine.team, mine.local.slots, mine.local.prices["L4"].spot) == ("nlp", 3, 8)
    assert mine.local.prices["cpu"] == shipped.local.prices["cpu"]


def test_gpu_names_as_skypilot_spells_them() -> None:
    names = {
        "NVIDIA L4": "L4", "Tesla T4": "T4", "NVIDIA A10G": "A10G", "NVIDIA H100 80GB HBM3": "H100",
        "NVIDIA H200": "H200", "NVIDIA A100-SXM4-40GB": "A100", "NVIDIA A100-SXM4-80GB": "A100-80GB",
        "NVIDIA GeForce RTX 4090": "RTX4090",
    }  # fmt: skip
    for full, short in names.items():
        listing = f"0, GPU-1, {full}, {81920 if '80GB' in full else 40960}\n"
        assert local_layout._visible(listing, None) == [local_layout.Gpu("0", short)]


@pytest.mark.parametrize(
    ("visible", "devices"),
    [
        (None, ["0", "1"]),
        ("1", ["1"]),
        ("1,0", ["1", "0"]),
        ("", []),
        ("-1", []),
        ("GPU-b", ["GPU-b"]),
        ("0,9,1", ["0"]),
    ],
)
def test_visible_gpus(visible: str | None, devices: list[str]) -> None:
    listing = "0, GPU-a1, NVIDIA L4, 23034\n1, GPU-b2, NVIDIA L4, 23034\n"
    assert [gpu.device for gpu in local_layout._visible(listing, visible)] == devices


def test_prices(tmp_path: Path) -> None:
    settings = load_settings(tmp_path, tmp_path)
    spot, on_demand = local_prices(settings, [local_layout.Gpu("0", "L4")] * 2, Demand(gpu="L4", gpus=2), at=5.0)
    assert (spot.accelerators, spot.use_spot, on_demand.use_spot, spot.at) == ("L4:2", True, False, 5.0)
    assert spot.price_usd_per_hour == 2 * settings.local.prices["L4"].spot
    unknown = local_prices(settings, [local_layout.Gpu("0", "XPU")], Demand(), at=0.0)[0]
    assert unknown.price_usd_per_hour == 0
    assert "no price for XPU" in unknown.source


def test_due_preemptions() -> None:
    planned = [{"after_s": 20.0}, {"at_step": 40.0, "notice_s": 30.0}]
    assert due(planned, [], 19.9, 39) is None
    assert due(planned, [], 20.0, None) == 0
    assert due(planned, [0], 99.0, None) is None
    assert due(planned, [0], 99.0, 41) == 1
    assert due(planned, [0, 1], 99.0, 99) is None


def test_probe(tmp_path: Path) -> None:
    store, keys = Store(f"file://{tmp_path}/bucket"), Keys("run-a")
    assert probe(store.url, "run-a").commit == ""
    for attempt, step in ((1, 50), (2, 10)):
        store.create(
            keys.commit(attempt, step), Commit(run_id="run-a", step=step, attempt=attempt, files={}).to_bytes()
        )
    store.create(keys.failed, TerminalMarker(run_id="run-a", attempt=1, at=0.0, reason="why", exit_code=2).to_bytes())
    seen = probe(store.url, "run-a")
    assert (seen.commit, seen.failed, seen.failed_code, seen.completed) == (keys.commit(2, 10), "why", 2, False)
    for progress, expected in (
        (b"{", False),
        (Progress(run_id="run-a", attempt=2, phase="preempted").to_bytes(), False),
        (Progress(run_id="run-a", attempt=2, phase="stalled").to_bytes(), True),
    ):
        store.write(keys.progress, progress)
        assert probe(store.url, "run-a").stalled is expected
    store.create(keys.completed, b"{}")
    assert probe(store.url, "run-a").completed


def test_the_kept_environment_is_private_and_without_another_runs_names(tmp_path: Path) -> None:
    layout = LocalFolders(tmp_path)
    path = layout.environment("run-a")
    environ = {"PATH": "/bin", "SPOTUNE_RUN_ID": "other", "SLURM_JOB_ID": "1", "SPOTUNE_NUM_PROCESSES": "2"}
    keep_environment(path, environ, {"TOKEN": "x"})
    assert path.stat().st_mode & 0o777 == 0o600
    assert kept_environment(layout, "run-a") == {"PATH": "/bin", "SPOTUNE_NUM_PROCESSES": "2", "TOKEN": "x"}
    assert kept_environment(layout, "run-b") == {}


def test_a_recycled_pid_is_not_the_process_that_had_it() -> None:
    import os

    me = Identity.of(os.getpid())
    assert me.alive
    other = Identity(me.pid, me.created - 3600)
    assert not other.alive
    assert members(other, "no such marker") == []
    assert boot_id() == boot_id()


def test_a_file_beats_a_missing_one(tmp_path: Path) -> None:
    assert tasks.shipped_file("no/such/file.yaml", tmp_path) is None


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (os.mkfifo, "is a FIFO"),
        (Path.mkdir, "is a folder"),
        (lambda path: path.symlink_to("/dev/zero"), "is a device"),
        (lambda path: path.symlink_to("train.yaml"), "cannot be read"),
    ],
    ids=["a FIFO", "a folder", "a device", "a loop"],
)
def test_a_task_of_ones_own_that_cannot_be_read_is_not_passed_over(
    tmp_path: Path, make: Callable[[Path], object], says: str
) -> None:
    (tmp_path / "tasks").mkdir()
    make(tmp_path / tasks.TRAIN)
    with pytest.raises(InputError, match=f"{tasks.TRAIN}: {says}"):
        tasks.load_task(tmp_path)


def test_a_lock_that_another_process_keeps_is_not_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(io, "MOST_S", 0.1)
    entry = RunEntry("run-a", "aws", "s3://b", "ada", 0, 1.0, "/", {})
    for lock, verb in (
        (tmp_path / "queue.lock", Queue(tmp_path / "queue.db").create),
        (tmp_path / "skypilot/runs/.lock", lambda: Registry(tmp_path).create(entry)),
    ):
        lock.parent.mkdir(parents=True, exist_ok=True)
        with open(lock, "w") as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            with pytest.raises(InfraError, match=rf"{lock}: locked by another process for 0.1 s"):
                verb()
        verb()


def test_a_pipe_in_the_place_of_a_lock_is_set_aside(tmp_path: Path) -> None:
    folder = tmp_path / "skypilot/runs"
    folder.mkdir(parents=True)
    os.mkfifo(folder / ".lock")
    registry = Registry(tmp_path)
    registry.create(RunEntry("run-a", "aws", "s3://b", "ada", 0, 1.0, "/", {}))
    assert registry.entry("run-a")


def test_a_refused_job_leaves_the_one_of_its_name_alone(tmp_path: Path) -> None:
    queue, told = Queue(tmp_path / "queue.db"), list[str]()
    queue.create()
    first = Submission(run_id="run-a", task={"run": "x"}, workdir="/", user="ana", secrets={"KEY": "v"})
    queue.add(first, "file:///b", lambda: told.append("first"))
    with pytest.raises(AlreadyExists, match="--name: run-a is in this machine's queue already \\(another --name\\)"):
        queue.add(first, "file:///other", lambda: told.append("second"))
    date = replace(first, run_id="run-b", task={"run": datetime.date(2026, 1, 1)})
    with pytest.raises(TypeError):
        queue.add(date, "file:///b", lambda: told.append("third"))
    assert told == ["first"]
    assert [job.run_id for job in queue.jobs()] == ["run-a"]


def test_a_queue_that_is_none_is_named_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "queue.db").write_bytes(b"no database, and long enough to be looked at as one" * 100)
    with pytest.raises(InfraError, match=r"queue\.db: file is not a database \(any verb makes it anew: .*\)"):
        Queue(tmp_path / "queue.db").jobs()


def test_a_home_on_a_disk_that_fails_is_not_bad_input(tmp_path: Path) -> None:
    with file_system(tmp_path / "home") as home:
        assert remounted(home, "ro")
        layout = LocalFolders(home / "local")
        with pytest.raises(InfraError, match="SPOTUNE_HOME: cannot make .*: Read-only file system"):
            layout.make()
        with pytest.raises(InfraError, match="SPOTUNE_HOME: cannot write .*: Read-only file system"):
            keep_environment(layout.environment("a-run"), {}, {})
