"""What SkyPilot's runs and dev clusters leave here, in the bucket and on a cluster, damaged: never a traceback."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spotune.cli import main
from spotune.core.keys import Keys
from spotune.core.records import ClusterRecord
from spotune.core.store import Store
from spotune.launch.engine import JobStatus, PaidInterval
from spotune.launch.skypilot import client as skypilot_client
from spotune.launch.skypilot import clusters, dev, jobs
from spotune.launch.skypilot.engine import Entry, Registry
from tests.commands import cli_runner
from tests.hostile import HOW, changed, spoil, values
from tests.unit.cost.cases import run
from tests.unit.launch.skypilot.fake_client import FakeClient
from tests.unit.launch.skypilot.fake_sky import FakeSky
from tests.unit.launch.skypilot.fake_sky import sky as sky
from tests.unit.launch.skypilot.test_booking import row

ROOT = Path(__file__).parents[4]
T = 1_700_000_000.0
STATE = {"schema_version": 1, "verdict": "idle", "why": "idle for 1 min, the last: x", "busy": [], "started_at": T,
         "looked_at": T, "last_active_at": T, "idle_minutes": 30.0, "stops_at": T + 9}  # fmt: skip
CLUSTER = ClusterRecord(
    name="dev-ada", cluster_hash="h", launched_at=1000, owner="ada", spans=[[1000, None]], updated_at=2000,
    price={"infra": "aws", "use_spot": True, "price_usd_per_hour": 1.0, "source": "catalog"},
)  # fmt: skip
SETTINGS = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def spotune(*arguments: str, codes: tuple[int, ...] = (0, 1, 2, 3)) -> Result:
    result = cli_runner().invoke(main, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    assert result.exit_code in codes, result.output + result.stderr
    assert "Traceback" not in result.output + result.stderr
    return result


def put(path: Path, damage: Any) -> None:
    """Damages a file: in one of the ways of ``spoil``, or with other JSON in it."""
    spoil(path, damage if isinstance(damage, str) else "empty")
    if not isinstance(damage, str):
        path.write_text(json.dumps(damage))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("SPOTUNE_USER", "ada")
    monkeypatch.setattr(jobs, "WAITS_S", (0, 0))
    monkeypatch.setattr(skypilot_client, "check_answers", lambda: None)
    monkeypatch.setattr(skypilot_client, "events", lambda job_id: [])
    monkeypatch.setattr(skypilot_client, "cost_rows", lambda names: [row((1000, None))] if "dev-ada" in names else [])
    return tmp_path / "home"


def entry(run_id: str, bucket: str, **changes: Any) -> Entry:
    return Entry(run_id, "aws", bucket, "ada", 0, T, "/", {"run": "x", "envs": {"SPOTUNE_BUCKET": bucket}}, **changes)


def ended(run_id: str) -> dict[str, Any]:
    """How a run has ended, and where it was."""
    status = JobStatus(run_id, "FAILED", 0, "ada", "aws", T, T + 1, T + 9, reason="why", exit_code=1)
    return {"ended": asdict(status), "history": [asdict(PaidInterval(run_id, T + 1, T + 9, "aws"))], "jobs": [7]}


def entries(bucket: str) -> list[Entry]:
    return [entry("run-a", bucket, **ended("run-a")), entry("run-b", bucket, **ended("run-b")), entry("run-c", bucket)]


@SETTINGS
@given(data=st.data(), verb=st.sampled_from((["queue", "-a"], ["cost", "run-b"], ["cost", "--since", "9999d"],
                                             ["logs", "run-b"], ["resume", "run-b"], ["cancel", "run-b", "-y"],
                                             ["preempt", "run-b", "--no-notice", "-y"])))  # fmt: skip
def test_a_damaged_entry_is_one_line_and_other_runs_are_listed(
    home: Path, monkeypatch: pytest.MonkeyPatch, data: st.DataObject, verb: list[str]
) -> None:
    shutil.rmtree(home, ignore_errors=True)
    client, store = FakeClient(), Store(f"file://{home}/bucket")
    monkeypatch.setattr(skypilot_client, "sdk", lambda: client)
    registry = Registry(home)
    for one in entries(store.url):
        registry.write(one)
        store.write(Keys(one.run_id).run, run(run_id=one.run_id, infra="aws").to_bytes())
    path = registry.folder / "run-b.json"
    put(path, data.draw(st.one_of(st.sampled_from(HOW), changed(json.loads(path.read_bytes())))))
    spotune(*verb)
    listed = spotune("queue", "-a", "--format", "json", codes=(0,)).stdout
    assert {"run-a", "run-c"} <= {row["run_id"] for row in json.loads(listed)}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"run_id": "run-a"}, "run_id: not run-b"),
        ({"ended": {}}, "ended: infra: missing"),
        ({"ended": {**ended("run-b")["ended"], "state": 7}}, "ended: state: not one of PENDING, "),
        ({"ended": ended("run-a")["ended"]}, "ended: run_id: not run-b"),
        ({"history": [{}]}, "history: ended_at: missing"),
        ({"history": [{**ended("run-b")["history"][0], "nodes": 0}]}, "history: nodes: not from 1 to "),
        ({"submitted_at": 1e15}, "submitted_at: not a time in epoch seconds"),
        ({"jobs": ["7"]}, "jobs: not a list"),
    ],
)
def test_a_damaged_entry_is_set_aside(
    home: Path, changes: dict[str, Any], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    registry = Registry(home)
    registry.write(entry("run-b", "file:///b", **ended("run-b")))
    path = registry.folder / "run-b.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **changes}))
    assert registry.entries() == []
    line = capsys.readouterr().err
    assert line.startswith(f"{path}: {says}")
    assert line.endswith(": set aside as run-b.json.damaged-1\n")


VERBS = (["ls"], ["ls", "--format", "json"], ["stop", "dev-ada"], ["down", "dev-ada", "-y"],
         ["run", "config/runs/demo.yaml", "-c", "dev-ada"])  # fmt: skip


@SETTINGS
@given(data=st.data(), verb=st.sampled_from(VERBS))
def test_a_damaged_record_of_a_cluster_stops_no_verb_of_dev(
    home: Path, sky: FakeSky, monkeypatch: pytest.MonkeyPatch, data: st.DataObject, verb: list[str]
) -> None:
    shutil.rmtree(home, ignore_errors=True)
    sky.add("dev-ada")
    monkeypatch.setattr(clusters, "write_config", lambda *names, everyones=False: None)
    monkeypatch.setattr(clusters, "read", lambda *_: json.dumps(STATE))
    Store(f"file://{home}/bucket").write(CLUSTER.key, CLUSTER.to_bytes())
    put(home / "bucket" / CLUSTER.key, data.draw(st.one_of(st.sampled_from(HOW), changed(asdict(CLUSTER)))))
    done = spotune("dev", *verb, codes=(0,))
    if verb[0] == "ls":
        assert "dev-ada" in done.stdout
    spotune("cost", "--clusters", "--since", "9999d")


@SETTINGS
@given(data=st.data(), verb=st.sampled_from(VERBS[:2]))
def test_whatever_a_watcher_says_the_cluster_is_listed(
    sky: FakeSky, monkeypatch: pytest.MonkeyPatch, data: st.DataObject, verb: list[str]
) -> None:
    sky.add("dev-ada")
    text = st.one_of(
        st.sampled_from(["", "{", "[" * 100_000, '{"why": ']), st.one_of(changed(STATE), values).map(json.dumps)
    )
    said = data.draw(text)
    monkeypatch.setattr(clusters, "write_config", lambda *names, everyones=False: None)
    monkeypatch.setattr(clusters, "read", lambda *_: said)
    assert "dev-ada" in spotune("dev", *verb, codes=(0,)).output


@pytest.mark.parametrize(
    "said",
    [
        "", "{", "[" * 100_000, "[]", '{"port": 1e999, "token": ""}', '{"port": "x", "token": "a"}', '{"port": 8888}',
        '{"port": 0, "token": ""}', '{"port": 70000, "token": ""}', '{"port": 8888, "token": "a\\nb"}',
        '{"port": 8888, "token": 7}',
    ],
)  # fmt: skip
def test_what_says_that_it_is_a_notebook(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "read", lambda *_: said)
    assert dev.find("dev-ada") is None
    monkeypatch.setattr(clusters, "read", lambda *_: '{"port": 8888, "token": "t0k-e_n", "pid": 7}')
    assert dev.find("dev-ada") == dev.Server(8888, "t0k-e_n")


def test_what_a_cluster_prints_need_not_be_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "ssh_command", lambda *_: ["printf", r"\377\376"])
    assert clusters.read("dev", "") == "\ufffd\ufffd"
