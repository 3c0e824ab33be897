"""What earlier versions wrote stays readable: each file of tests/golden, by today's readers, writers and verbs.

tests/golden/README.md says how to add a folder. All folders are read. Only the newest is also written again: a field
that is added changes what today's code writes, and is no fault of an old file.

Not compared byte by byte: SQLite files (their pages depend on SQLite's version, so their rows are kept), and the plain
objects control.json, restored.json, candidate.json and machine.json, which are written in place.
"""

import ast
import importlib
import inspect
import json
import pkgutil
import re
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, fields, is_dataclass
from itertools import product
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest

import spotune
from spotune.cli import main
from spotune.core import keys as keys_module
from spotune.core import protocol
from spotune.core.io import load_as, write_state
from spotune.core.keys import Keys, attempt_of, checkpoint_of, cluster_key, commit_of, revision_of
from spotune.core.money import usd
from spotune.core.protocol import (
    Control,
    ControlState,
    EventLog,
    ExtraJob,
    ExtraResult,
    Outcome,
    Staged,
    WorkerJob,
    parse_lines,
    read_json,
    write_json,
)
from spotune.core.records import ClusterRecord, Commit, PriceRow, Progress, Record, RunRecord, read_clusters
from spotune.core.revisions import record_history
from spotune.core.store import Store
from spotune.cost.index import VERSION, index_file, use_index
from spotune.guard.checkpoints import sealed
from spotune.launch.code import differs
from spotune.launch.local import database
from spotune.launch.local.database import AttemptRow
from spotune.launch.local.engine import only_one
from spotune.launch.local.layout import AttemptFiles, Exit, LocalFolders, Running
from spotune.launch.local.machine import load_kept
from spotune.launch.local.programs import BucketProbe
from spotune.launch.local.queue import Queue
from spotune.launch.skypilot.engine import Registry, RunEntry
from tests.commands import cli_runner
from tests.golden.kinds import EVENTS, kind_of, read_record

GOLDEN = Path(__file__).parents[2] / "golden"
FOLDERS = sorted(GOLDEN.glob("v[0-9]*"), key=lambda folder: int(folder.name[1:]))
NEWEST = FOLDERS[-1]
HOME_THEN = "/tmp/spotune-golden/project/home"
T = 1_796_000_000  # all times in a golden file are after this one, or those of the dev cluster


def files_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def all_keys() -> list[Any]:
    found = [(folder, key) for folder in FOLDERS for key in files_below(folder / "bucket")]
    return [pytest.param(folder, key, id=f"{folder.name}-{key}") for folder, key in found]


def loaded(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / name).read_bytes())
    return found


def known_fields(value: Any, wanted: dict[str, Any]) -> dict[str, Any]:
    """A record's fields, without those that came later and have their default."""
    later = {one.name for one in fields(value) if one.name not in wanted}
    assert value == type(value)(**{name: one for name, one in vars(value).items() if name not in later})
    return {name: one for name, one in asdict(value).items() if name not in later}


# The bucket's records.


@pytest.mark.parametrize(("folder", "key"), all_keys())
def test_every_object_is_read_field_by_field(folder: Path, key: str) -> None:
    data = (folder / "bucket" / key).read_bytes()
    if re.fullmatch(EVENTS, key):
        assert parse_lines(data) == [json.loads(line) for line in data.splitlines()]
    elif kind_of(key):
        wanted = json.loads(data)
        assert known_fields(read_record(key, data), wanted) == wanted
        if key in (expected := loaded(folder, "expected.json")):
            assert known_fields(read_record(key, data), expected[key]) == expected[key]


def test_expected_values_are_of_each_kind_of_record() -> None:
    for folder in FOLDERS:
        expected = loaded(folder, "expected.json")
        kinds = {kind_of(key) for key in files_below(folder / "bucket")} - {None}
        assert {kind_of(key) for key in expected} == kinds
        assert expected.keys() <= set(files_below(folder / "bucket"))


@pytest.mark.parametrize("key", [key for key in files_below(NEWEST / "bucket") if kind_of(key)])
def test_a_record_is_written_again_byte_by_byte(key: str) -> None:
    data = (NEWEST / "bucket" / key).read_bytes()
    assert read_record(key, data).to_bytes() == data


@pytest.mark.parametrize("key", [key for key in files_below(NEWEST / "bucket") if re.fullmatch(EVENTS, key)])
def test_events_are_written_again_byte_by_byte(key: str, tmp_path: Path) -> None:
    data = (NEWEST / "bucket" / key).read_bytes()
    times: list[float] = []
    log = EventLog(tmp_path / "events.jsonl", clock=lambda: times[-1])
    for event in parse_lines(data):
        times.append(event.pop("t"))
        log.write(event.pop("event"), **event)
    log.close()
    assert (tmp_path / "events.jsonl").read_bytes() == data


# Nothing is without a golden file.

NOT_LOOKED_AT = {"lock"}  # of the local queue's layout


def test_every_class_of_records_has_a_golden_file() -> None:
    for module in pkgutil.walk_packages(spotune.__path__, "spotune."):
        if not module.name.startswith(("spotune.sft", "spotune.idle")):  # these write no record, and may want torch
            importlib.import_module(module.name)

    def below(kind: type) -> Iterator[type]:
        for one in kind.__subclasses__():
            yield one
            yield from below(one)

    kept = {kind_of(key) for key in files_below(NEWEST / "bucket")} | {PriceRow}  # a part of run.json and of bills
    classes = {kind for kind in below(Record) if kind.__module__.startswith("spotune.")}
    assert not classes - kept, "add them to tests/golden/make.py and kinds.py, and make a new folder"


def names_of(keys: Keys, commits: list[tuple[int, int]], lost: list[tuple[float, float]]) -> dict[str, list[str]]:
    """What each property and method of Keys makes for the golden runs; the arguments are tried by their names."""
    steps, attempts = sorted({step for _, step in commits} | {0}), [1, 2, 3]
    tried: dict[str, list[Any]] = {
        "step": steps, "attempt": attempts, "rank": [0], "part": [0, 1, 2], "revision": [1],
        "started_at": [start for start, _ in lost], "ended_at": [end for _, end in lost],
    }  # fmt: skip
    found: dict[str, list[str]] = {}
    for name, member in vars(Keys).items():
        if isinstance(member, property):
            found[name] = [str(getattr(keys, name))]
        elif inspect.isfunction(member) and not name.startswith("_"):
            wanted = [one for one in inspect.signature(member).parameters if one != "self"]
            assert set(wanted) <= tried.keys(), f"Keys.{name}: say here which values its arguments have"
            found[name] = [member(keys, *values) for values in product(*(tried[one] for one in wanted))]
    return found


def test_every_key_has_a_golden_file() -> None:
    there = files_below(NEWEST / "bucket")
    folders = {parent.as_posix() for key in there for parent in Path(key).parents}
    made: dict[str, list[str]] = {}
    for run_id in sorted({key.split("/")[1] for key in there if key.startswith("runs/")}):
        own = [key for key in there if key.startswith(f"runs/{run_id}/")]
        commits = [found for key in own if (found := commit_of(key))]
        times = [Path(key).stem.split("-") for key in own if "/lost/" in key]
        lost = [(int(start) / 1000, int(end) / 1000) for start, end in times]
        for name, keys in names_of(Keys(run_id), commits, lost).items():
            made.setdefault(name, []).extend(keys)
    missing = [name for name, keys in made.items() if not {*keys} & {*there, *folders}]
    assert not missing, "add them to tests/golden/make.py, and make a new folder"
    (cluster,) = (key for key in there if key.startswith("clusters/"))
    assert cluster == cluster_key("dev-ana", 1_767_225_600.7)


def test_every_function_that_makes_or_reads_a_key_is_held_to_the_golden_names() -> None:
    makes = {
        one
        for one in vars(keys_module).values()
        if inspect.isfunction(one)
        and one.__module__ == keys_module.__name__
        and not one.__name__.startswith("_")
        and (one.__name__.endswith(("_key", "_of")) or one is keys_module.attempt_number)
        and one not in (keys_module.number_of, keys_module.is_key)
    }
    assert makes == {cluster_key, revision_of, attempt_of, keys_module.attempt_number, commit_of, checkpoint_of}
    there = files_below(NEWEST / "bucket")
    assert {revision_of(key) for key in there} == {None, 1}
    assert {attempt_of(key) for key in there} == {None, 1, 2, 3}
    done = [key for key in there if key.startswith("runs/done/")]
    commits = {commit_of(key) for key in done} - {None}
    assert commits == {(2, 3), (2, 5), (3, 8)}
    assert {checkpoint_of(key.split("/")[3]) for key in done if "/checkpoints/" in key} == commits


def test_every_kind_of_event_has_a_golden_line() -> None:
    there = [key for key in files_below(NEWEST / "bucket") if re.fullmatch(EVENTS, key)]
    events = [event for key in there for event in parse_lines((NEWEST / "bucket" / key).read_bytes())]
    assert all(event["t"] > T for event in events)
    written = written_events()
    assert len(written) >= 15  # else written_events does not find them any more
    assert not written - {event["event"] for event in events}
    phases = {event["phase"] for event in events if event["event"] == "phase"}
    assert phases == {"load", "restore", "train", "save", "teardown"}


def written_events() -> set[str]:
    """The names that src/ gives to ``write`` of an event log or a journal: the first argument, where it is text."""
    found = set()
    for path in Path(spotune.__path__[0]).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "write":
                first = node.args[0] if node.args else None
                if isinstance(first, ast.Constant) and isinstance(first.value, str) and first.value.isalpha():
                    found.add(first.value)
    return found


# What the bucket as a whole says.


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_parts_of_a_run_fit_together(folder: Path) -> None:
    store = Store(f"file://{folder}/bucket")
    history = record_history(store, Keys("failed"))
    assert [(one.revision, one.allowed, one.config["learning_rate"]) for one in history] == [
        (0, [], 0.001),
        (1, ["learning_rate"], "2e-3"),
    ]
    first = history[0]
    assert (first.user, first.team, first.infra, first.wall_usd) == ("ada", "nlp", "local", None)
    assert [(row.use_spot, row.price_usd_per_hour) for row in first.price_rows()] == [(True, 108.0), (False, 288.0)]
    assert differs(first.code, loaded(folder, "bucket/runs/failed/code/commit.json")) == ""
    run = RunRecord.from_bytes(store.read("runs/done/run.json") or b"")
    assert (run.wall_usd, run.priority, run.config["merge_adapter"]) == (50.0, 7, True)
    newest = Commit.from_bytes(store.read(Keys("done").commit(3, 8)) or b"")
    assert (newest.parent, newest.ordinal, newest.tokens) == (Keys("done").commit(2, 5), 3, 128)
    for name, facts in newest.files.items():
        data = store.read(f"{Keys('done').checkpoint(8, 3)}/{name}")
        assert data is not None
        assert len(data) == facts["size"]
    (cluster,) = read_clusters(store, ["dev-ana"])
    assert isinstance(cluster, ClusterRecord)
    assert cluster.is_up
    assert cluster.price_row
    assert cluster.price_row.price_usd_per_hour == 0.36
    assert cluster.intervals() == [(1_767_225_600.0, 1_767_229_200.0), (1_767_232_800.0, 1_767_234_600.0)]


# Files between guard and worker.

SEAM = {
    "job.json": WorkerJob,
    "outcome-0.json": Outcome,
    "extras.json": ExtraJob,
    "answer-merge.json": ExtraResult,
    "staged/00000003-0.json": Staged,
    "sealed/00000003.json": Staged,
}


def worker_files() -> list[Any]:
    found = [(folder, name) for folder in FOLDERS for name in files_below(folder / "worker")]
    return [pytest.param(folder, name, id=f"{folder.name}-{name}") for folder, name in found]


@pytest.mark.parametrize(("folder", "name"), worker_files())
def test_what_guard_and_worker_say_is_read_and_written_again(folder: Path, name: str, tmp_path: Path) -> None:
    path = folder / "worker" / name
    kind = SEAM.get(re.sub(r"0000000\d", "00000003", name.split("/", 1)[1]))
    if kind is None:
        assert Path(name).name in ("control.json", "restored.json", "candidate.json", "verdict.json")
        return
    value = load_as(path, kind) if kind is not WorkerJob and kind is not ExtraJob else kind(**read_json(path))
    wanted = json.loads(path.read_bytes())
    assert known_fields(value, wanted) == wanted
    if folder == NEWEST:
        write_json(tmp_path / "again.json", value)
        assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


def test_every_message_between_guard_and_worker_has_a_golden_file() -> None:
    classes = {one for one in vars(protocol).values() if is_dataclass(one) and one.__module__ == protocol.__name__}
    public = {one for one in classes if not one.__name__.startswith("_")}
    assert not {one for one in public if not issubclass(one, Record)} - {ControlState, *SEAM.values()}
    names = {Path(name).name for name in files_below(NEWEST / "worker")}
    constants = [value for value in vars(protocol).values() if isinstance(value, str) and value.endswith(".json")]
    assert {*constants} <= names


@pytest.mark.parametrize("folder", FOLDERS)
def test_what_an_old_guard_asked_for_is_understood(folder: Path, tmp_path: Path) -> None:
    finished, running = folder / "worker/finished", folder / "worker/running"
    for asked in (finished, running):
        assert Control(asked).look() == ControlState()
    restored = read_json(finished / protocol.RESTORED)
    assert {name: restored[name] for name in ("tokens", "global_batch", "error", "other_versions_allowed")} == {
        "tokens": 80, "global_batch": 1, "error": None, "other_versions_allowed": False,
    }  # fmt: skip
    assert restored["checkpoint"].endswith("/trainer/checkpoint-5")
    assert read_json(finished / protocol.VERDICT) == {"number": 0, "fault": ""}
    # What the next attempt on the same machine finds: a sealed checkpoint that no commit has.
    here = tmp_path / "work/running/node-0/0001"
    copytree(running, here)
    seal = here / "sealed/00000003.json"
    seal.write_text(seal.read_text().replace(HOME_THEN, str(tmp_path)))
    (found,) = sealed(here)
    assert (found.step, found.tokens, found.revision, len(found.files)) == (3, 48, 0, 6)
    run = RunRecord.from_bytes((folder / "bucket/runs/running/run.json").read_bytes())
    assert found.config_sha256 == run.config_sha256


# The local queue, and what was handed to SkyPilot.


def restored_home(folder: Path, home: Path) -> Path:
    """A SPOTUNE_HOME as that version left it, with the bucket, at another place."""
    copytree(folder / "home/local", home / "local")
    copytree(folder / "bucket", home / "bucket")
    (home / "cache").mkdir()
    files = {"local/queue": home / "local/queue.db", "cache/cost": index_file(home / "cache", f"file://{home}/bucket")}
    for name, path in files.items():
        with closing(sqlite3.connect(path)) as connection:
            connection.executescript((folder / f"home/{name}.sql").read_text().replace(HOME_THEN, str(home)))
    (home / "local/queue.sql").unlink()
    for log in (home / "local/jobs").glob("*/log.txt"):
        log.write_text(log.read_text().replace(HOME_THEN, str(home)))
    return home


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_queue_of_an_old_version_is_read(folder: Path, tmp_path: Path) -> None:
    home = restored_home(folder, tmp_path / "home")
    queue, lines = Queue(home / "local/queue.db"), []
    queue.create(lines.append)
    assert lines == [] if folder == NEWEST else len(lines) <= 1
    jobs = {job.run_id: job for job in queue.jobs()}
    assert list(jobs) == ["done", "failed", "paused", "cancelled", "running"]  # by priority, then by submission
    running = jobs["running"]
    assert (running.state, running.priority, running.attempt, running.secrets) == ("RUNNING", -5, 1, ["GOLDEN_TOKEN"])
    assert running.preemptions == [{"after_s": 80_000.0, "notice_s": 30.0}]
    assert (running.demand.gpu, running.demand.gpus, running.bucket) == ("L4", 1, f"file://{home}/bucket")
    assert [jobs[name].exit_code for name in ("done", "failed", "paused")] == [0, 1, 76]
    assert jobs["cancelled"].faults == 0
    (request,) = queue.requests()
    assert (request.run_id, request.kind, request.notice_s) == ("running", "preempt", 30.0)
    assert (queue.fact("slots"), queue.fact("gpus")) == (1, [{"device": "0", "name": "L4"}])
    (open_one,) = queue.unsettled()
    assert (open_one.run_id, open_one.slots, open_one.accelerators, open_one.is_dated) == ("running", [0], "L4:1", True)
    ends = [(one.end_reason, one.exit_code) for one in queue.attempts("done")]
    assert ends == [("preempted", None), ("preempted", 75), ("exited", 0)]


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_lost_queue_is_made_anew_from_an_old_copy(folder: Path, tmp_path: Path) -> None:
    home = restored_home(folder, tmp_path / "home")
    (home / "local/queue.db").unlink()
    queue = Queue(home / "local/queue.db")
    queue.create(lambda line: None)
    states = {job.run_id: (job.state, job.attempt, job.priority) for job in queue.jobs()}
    assert states == {"done": ("SUCCEEDED", 3, 7), "running": ("RUNNING", 1, -5)}


def test_the_copy_of_the_queue_is_written_again_byte_by_byte(tmp_path: Path) -> None:
    home = restored_home(NEWEST, tmp_path / "home")
    copies = {name: (home / "local/kept" / name).read_bytes() for name in files_below(home / "local/kept")}
    with closing(database.connect(home / "local/queue.db")) as connection:
        for row in connection.execute("SELECT * FROM jobs WHERE run_id IN ('done', 'running')").fetchall():
            database.keep_job(tmp_path, row)
    for name, data in copies.items():
        row_then, row_now = json.loads(data), json.loads((tmp_path / "kept" / name).read_bytes())
        assert row_now.keys() == row_then.keys()
        # The first copy of a job is made before its machine: what a machine changes is in its own folder.
        changed = {column for column in row_now if row_now[column] != row_then[column]} - {"bucket", "submission"}
        assert changed <= ({"state", "attempt", "started_at"} if name == "running.json" else set())


LOCAL_FILES: dict[str, type] = {
    "attempt.json": AttemptRow,
    "running.json": Running,
    "exit.json": Exit,
    "look.json": BucketProbe,
    "status.json": Progress,
}


@pytest.mark.parametrize("folder", FOLDERS)
def test_what_a_machine_left_for_the_supervisor_is_read(folder: Path, tmp_path: Path) -> None:
    seen = set()
    for path in sorted((folder / "home/local/jobs").rglob("*.json")):
        if kind := LOCAL_FILES.get(path.name):
            wanted = json.loads(path.read_bytes())
            value = load_as(path, kind)
            assert value is not None
            if kind is BucketProbe:  # a field that nobody reads any more; the file lives for one probe
                del wanted["at"]
            assert known_fields(value, wanted) == wanted
            if folder == NEWEST and kind is not BucketProbe:
                write_state(tmp_path / path.name, value)
                assert (tmp_path / path.name).read_bytes() == path.read_bytes()
            seen.add(path.name)
    assert seen == LOCAL_FILES.keys()
    layout = LocalFolders(folder / "home")
    kept = load_kept(layout.environment("running"))
    assert kept["secrets"] == {"GOLDEN_TOKEN": "not-a-secret"}
    assert kept["environ"]["SPOTUNE_USER"] == "ada"
    status = layout.attempt("done", 3).read_status()
    assert status == {"step": 8, "max_steps": 8, "loss": 0.125, "phase": "completed"}
    names = {name for name, member in vars(AttemptFiles).items() if isinstance(member, property)}
    found = {name for name in names for run_id, attempt in (("done", 3), ("running", 1))
             if getattr(layout.attempt(run_id, attempt), name).exists()}  # fmt: skip
    assert found == names


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_run_that_was_handed_to_skypilot_is_known(folder: Path, tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    copytree(folder / "home/skypilot/runs", registry.folder)
    path = registry.folder / "elsewhere.json"
    data, wanted = path.read_bytes(), json.loads(path.read_bytes())
    (entry,) = registry.entries()
    assert isinstance(entry, RunEntry)
    assert (entry.jobs, entry.preemptible, entry.secrets) == ([11], ["lab/spot"], ["GOLDEN_TOKEN"])
    status = entry.status()
    assert known_fields(status, wanted["ended"]) == wanted["ended"]
    (interval,) = entry.intervals() or []
    assert known_fields(interval, wanted["history"][0]) == wanted["history"][0]
    if folder == NEWEST:
        registry.write(entry)
        assert path.read_bytes() == data


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_index_of_an_old_version_is_read_or_made_anew(folder: Path, tmp_path: Path) -> None:
    home = restored_home(folder, tmp_path / "home")
    path = index_file(home / "cache", f"file://{home}/bucket")
    with closing(sqlite3.connect(path)) as connection:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
    lines: list[str] = []
    runs = use_index(path, lambda index: {key[1]: row for key, row in index.runs(0.0)}, lines.append)
    if version != VERSION:
        assert (runs, len(lines)) == ({}, 1)
        return
    wanted = {row["run_id"]: row for row in loaded(folder, "answers.json")["cost"]}
    assert lines == []
    assert {run_id: (row["state"], row["cost_usd"]) for run_id, row in runs.items()} == {
        run_id: (row["state"], pytest.approx(row["cost_usd"], abs=1e-6)) for run_id, row in wanted.items()
    }


# The verbs, on a copy.


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def home(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A SPOTUNE_HOME of that version, whose supervisor is said to run, in another time zone."""
    home = restored_home(request.param, tmp_path / "home")
    monkeypatch.setenv("SPOTUNE_HOME", str(home))
    monkeypatch.setenv("SPOTUNE_USER", "ada")
    monkeypatch.chdir(tmp_path)
    with only_one(LocalFolders(home)), pytest.MonkeyPatch.context() as zone:
        zone.setenv("TZ", "Asia/Kathmandu")
        time.tzset()
        yield home
    time.tzset()


@pytest.fixture
def answers(home: Path, request: pytest.FixtureRequest) -> dict[str, Any]:
    """What that version said of its runs."""
    text = (request.node.callspec.params["home"] / "answers.json").read_text()
    found: dict[str, Any] = json.loads(text.replace(HOME_THEN, str(home)))
    return found


def spotune_verb(*words: str) -> Any:
    done = cli_runner().invoke(main, words, prog_name="spotune")
    assert (done.exit_code, done.stderr) == (0, ""), done.stderr + repr(done.exception)
    return done.stdout


def close_to(wanted: Any) -> Any:
    """The same with figures to a millionth; what is sure to differ is left out."""
    match wanted:
        case dict():
            return {name: close_to(value) for name, value in wanted.items() if name != "reported_at"}
        case list():
            return [close_to(value) for value in wanted]
        case float():
            return pytest.approx(wanted, abs=1e-6)
    return wanted


def only_known(found: Any, wanted: Any) -> Any:
    """What was found, without keys that came later."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        return {name: only_known(found[name], wanted[name]) for name in wanted if name != "reported_at"}
    if isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        return [only_known(*pair) for pair in zip(found, wanted, strict=True)]
    return found


def test_queue_shows_old_runs_as_they_ended(home: Path, answers: dict[str, Any]) -> None:
    found = {row["run_id"]: row for row in json.loads(spotune_verb("queue", "--format", "json"))}
    assert found["running"]["state"] == "RUNNING"
    for row in answers["queue"]:
        assert only_known(found[row["run_id"]], row) == row
    states = {run_id: row["state"] for run_id, row in found.items() if run_id != "running"}
    assert states == {"done": "SUCCEEDED", "failed": "FAILED", "paused": "PAUSED", "cancelled": "CANCELLED"}
    table = spotune_verb("queue")
    assert [name in table for name in found] == [True] * len(found)


@pytest.mark.parametrize("run_id", ["done", "failed", "paused", "cancelled"])
def test_cost_of_an_old_run_is_what_it_was(home: Path, answers: dict[str, Any], run_id: str) -> None:
    before = files_below(home / "bucket")
    report = json.loads(spotune_verb("cost", run_id, "--format", "json"))
    assert files_below(home / "bucket") == before  # every machine has its bill already
    assert report["unread"] == []
    paid = sum(seconds for name, seconds in report["phases"].items() if name != "queue_s")
    assert paid == pytest.approx(report["paid_s"], abs=1e-6)
    assert report["cost_usd"] == pytest.approx(report["paid_s"] / 3600 * 108.0, abs=1e-6)
    (row,) = (row for row in answers["cost"] if row["run_id"] == run_id)
    for name in ("state", "team", "cost_usd", "on_demand_usd", "goodput", "useful_steps", "replayed_steps", "tokens"):
        assert report[name] == close_to(row[name]), name
    if wanted := answers.get(f"cost {run_id}"):
        assert only_known(report, wanted) == close_to(wanted)
    assert f"\ncost {usd(report['cost_usd'])}, " in spotune_verb("cost", run_id)


@pytest.mark.parametrize("run_id", ["done", "failed", "paused", "cancelled"])
def test_logs_of_an_old_run_are_there(home: Path, answers: dict[str, Any], run_id: str) -> None:
    assert spotune_verb("logs", run_id).splitlines() == answers[f"logs {run_id}"]


def test_runs_that_only_the_bucket_knows(home: Path, answers: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bucket, seen from a machine that has no queue of these runs."""
    monkeypatch.setenv("SPOTUNE_BUCKET", f"file://{home}/bucket")
    monkeypatch.setenv("SPOTUNE_HOME", str(home.parent / "another"))
    found = {row["run_id"]: row["state"] for row in json.loads(spotune_verb("queue", "-a", "--format", "json"))}
    wanted = {row["run_id"]: row["state"] for row in answers["queue"]}
    assert found == {**wanted, "running": "FAILED"}  # silent since
    for run_id in wanted:
        report = json.loads(spotune_verb("cost", run_id, "--format", "json"))
        (row,) = (row for row in answers["cost"] if row["run_id"] == run_id)
        assert report["cost_usd"] == close_to(row["cost_usd"])
