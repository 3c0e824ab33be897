"""The two contenders: what their runs left behind is counted, and plain TRL is what people really do."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from drill.contender import Hold
from drill.plainrun import PlainRun
from drill.servers import Bucket
from drill.spotrun import SpotRun, run_id_of
from spotune.core.environment import BUCKET, FAILPOINT_DIR, FAILPOINTS, HOME, RUN_ID
from spotune.core.keys import Keys, check_run_id
from spotune.core.records import AttemptRecord, Certificate
from spotune.core.store import Store

ROOT = Path(__file__).parents[3]
KEYS = Keys("played")


def test_the_same_command_on_every_machine() -> None:
    environ = {"SPOTUNE_HOME": "mine", "SKYPILOT_TASK_ID": "mine", "SLURM_JOB_ID": "1", "PATH": "/bin"}
    run = SpotRun("played", ["x.yaml", "--set", "max_steps=3"], Bucket("file:///b"), environ)
    first, held = run.launch(Path("/d1"), None), run.launch(Path("/d2"), Hold("staged:2", Path("/h")))
    assert first.command == held.command == [sys.executable, "-m", "spotune.sft", "x.yaml", "--set", "max_steps=3"]
    assert first.environ == {"PATH": "/bin", HOME: "/d1", BUCKET: "file:///b", RUN_ID: "played"}
    assert held.environ == {**first.environ, HOME: "/d2", FAILPOINTS: "staged:2", FAILPOINT_DIR: "/h"}


def test_what_the_bucket_says_of_a_run(store: Store, bucket: str) -> None:
    run = SpotRun("played", [], Bucket(bucket), {})
    claim = AttemptRecord(run_id="played", attempt=2, claimed_at=7.5, claim_id="c")
    store.create(KEYS.attempt(2), claim.to_bytes())
    store.create(KEYS.events(2, 0, 0), b'{"t": 1.7e9, "event": "start"}\n{"t": 1.7e9, "event": "resto')
    store.create(KEYS.events(2, 0, 1), b'{"t": 1.7e9, "event": "commit"}\n')
    store.write(f"{KEYS.checkpoint(4, 1)}/model", b"x")
    store.write(f"{KEYS.checkpoint(5, 1)}/model", b"x")
    store.create(KEYS.commit(1, 5), b"{}")
    store.create(KEYS.commit(1, 6), b"{}")
    account = run.account()
    assert account.weights is None
    assert [event["event"] for event in account.attempts[7.5]] == ["start", "commit"]
    assert (account.leftovers["orphan checkpoints"], account.leftovers["commits without data"]) == (1, 1)
    certificate = Certificate(run_id="played", attempt=2, step=9, weights_sha256="w", files={})
    store.create(KEYS.completed, certificate.to_bytes())
    assert run.account().weights == "w"


def test_partial_files_on_a_disk(tmp_path: Path) -> None:
    bucket = Bucket(f"file://{tmp_path}")
    (tmp_path / "runs/played/output").mkdir(parents=True)
    (tmp_path / "runs/played/output/.part-1").touch()
    (tmp_path / "runs/other").mkdir()
    (tmp_path / "runs/other/.part-2").touch()
    assert bucket.partial_files(KEYS.root) == 1
    assert bucket.unfinished_uploads(KEYS.root) == 0


def test_unfinished_uploads_on_s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3

    from drill.servers import s3_environment

    for name, value in s3_environment(s3_server).items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    for key in ("gd/runs/played/checkpoints/a", "gd/runs/played-more/a", "gd/runs/played/b"):
        client.create_multipart_upload(Bucket="spotune", Key=key)
    client.close()
    assert Bucket("s3://spotune/gd").unfinished_uploads("runs/played/") == 2
    assert Bucket("s3://spotune/gd").unfinished_uploads("runs/none/") == 0


@pytest.mark.parametrize("words", [("gd", "a1", "r0-0"), ("gd", "a1b2c3d4", "undisturbed"), ("Chaos", 1, "x" * 40)])
def test_run_ids(words: tuple[object, ...]) -> None:
    assert check_run_id(run_id_of(*words))


def plain(tmp_path: Path, **settings: object) -> PlainRun:
    return PlainRun(tmp_path / "run", {"max_steps": 3, **settings}, {"PATH": "/bin"})


def test_plain_keeps_its_disk_and_its_own_output(tmp_path: Path) -> None:
    run = plain(tmp_path, save_total_limit=7)
    first, second = run.launch(tmp_path / "d1", None), run.launch(tmp_path / "d2", None)
    assert first.command[:-1] == second.command[:-1]
    config = yaml.safe_load(Path(first.command[-2]).read_text())
    assert config["output_dir"] == str(tmp_path / "run" / "out")
    assert config["save_total_limit"] == 7
    assert run.event_log(tmp_path, 0.0) is None


def test_a_person_removes_the_newest_checkpoint(tmp_path: Path) -> None:
    run, out = plain(tmp_path), tmp_path / "run" / "out"
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-x", "runs"):
        (out / name).mkdir(parents=True)
    assert run.repair()
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint-9", "checkpoint-x", "runs"]
    assert run.repair()
    assert not run.repair()


def test_half_a_result_is_none(tmp_path: Path) -> None:
    run, out = plain(tmp_path), tmp_path / "run" / "out"
    assert run.account().weights is None
    out.mkdir()
    (out / "model.safetensors").write_bytes(b"\x00\x01")
    assert run.account().weights is None


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    def call(*words: str) -> "subprocess.CompletedProcess[str]":
        line = [sys.executable, str(ROOT / "benchmarks" / "gameday.py"), *words, "--work", str(tmp_path / "work")]
        return subprocess.run(line, capture_output=True, text=True, check=False, cwd=tmp_path)

    return call


def test_bad_input_is_one_line(command: Callable[..., "subprocess.CompletedProcess[str]"], tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("learning_rat: 1\n")
    (tmp_path / "good.yaml").write_text("model_name_or_path: m\ndataset_name: d\n")
    for words, said in (
        (("good.yaml", "--schedule", "trace:none.json"), "none.json: no such file"),
        (("good.yaml", "--schedule", "trace:none.json@soon"), "'soon' is not a number of seconds"),
        (("none.yaml", "--schedule", "random:1"), "none.yaml: no such file"),
        (("x.yaml", "--schedule", "random:1"), "did you mean learning_rate?"),
        (("x.yaml", "--schedule", "randon:1"), "--schedule: 'randon:1' is not known"),
        (("x.yaml", "--schedule", "random:1", "--lanes", "0"), "--lanes: 0 is too small"),
    ):
        done = command(*words)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
        assert said in done.stderr
