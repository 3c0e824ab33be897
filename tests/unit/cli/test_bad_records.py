"""Runs whose records were copied, cut or rewritten: one line names what is wrong, and the rest is shown."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from spotune.cli import main
from spotune.core.errors import StoreError
from spotune.core.keys import Keys
from spotune.core.store import Store
from tests.commands import cli_runner
from tests.unit.cost.cases import RUN_ID, three_attempts
from tests.unit.cost.test_read import write

KEYS, SINCE = Keys(RUN_ID), ("--since", "9999d")
Spoil = Callable[[Store], object]


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.chdir(tmp_path)
    store = Store(f"file://{tmp_path}/home/bucket")
    write(store, three_attempts())
    return store


def spotune(*arguments: str) -> Result:
    return cli_runner().invoke(main, arguments)


def copy(store: Store) -> None:
    runs = Path(store.url.removeprefix("file://"), "runs")
    shutil.copytree(runs / RUN_ID, runs / "a-copy")


def edit(key: str, **facts: object) -> Spoil:
    return lambda store: store.write(key, json.dumps({**json.loads(store.read(key) or b""), **facts}).encode())


@pytest.mark.parametrize(
    ("spoil", "name", "line"),
    [
        (copy, "a-copy", f"runs/a-copy/run.json: run_id: '{RUN_ID}', not that of its folder (a copy, or renamed)"),
        (edit(KEYS.run, user=["a"]), RUN_ID, f"{KEYS.run}: not a RunRecord: user: not a text: […]"),
        (lambda store: store.delete([KEYS.run]), RUN_ID, f"{KEYS.run}: missing, though there are attempts"),
        (lambda store: store.write(KEYS.run, b"[" * 200_000), RUN_ID, f"{KEYS.run}: not a RunRecord: maximum"),
        (edit(KEYS.run, prices=[{}]), RUN_ID, f"{KEYS.run}: prices[0]: not a PriceRow: infra: missing"),
    ],
)  # fmt: skip
def test_one_run_that_cannot_be_read(bucket: Store, spoil: Spoil, name: str, line: str) -> None:
    write(bucket, three_attempts(), run_id="good")
    spoil(bucket)
    result = spotune("cost", name)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(line)
    assert len(result.stderr.splitlines()) == 1
    for arguments in (("cost",), ("cost", "--by", "day"), ("cost", "--format", "focus"), ("cost", "--clusters")):
        result = spotune(*arguments, *SINCE)
        assert result.exit_code == 0
        assert result.stderr.startswith(f"{name} is left out: {line}")
        assert len(result.stderr.splitlines()) == 1
    result = spotune("queue", "-a")
    assert (result.exit_code, "good" in result.stdout) == (0, True)
    if "prices" not in line:  # of which the queue knows nothing
        assert result.stderr.startswith(f"{name} is left out: {line}")


def test_what_was_typed_breaks_no_table(bucket: Store) -> None:
    odd = {"user": "a\nb\x1b[31m", "team": "t\nx\u202e", "config_path": "c\rd.yaml"}
    edit(KEYS.run, **odd)(bucket)
    for arguments in (("cost",), ("cost", "--by", "user"), ("cost", "--by", "team"), ("cost", RUN_ID), ("queue", "-a")):
        since = SINCE if arguments[0] == "cost" and RUN_ID not in arguments else ()
        result = spotune(*arguments, *since)
        assert result.exit_code == 0, result.stderr
        assert all(line.isprintable() for line in result.stdout.splitlines())
        assert r"a\nb\x1b[31m" in result.stdout or r"t\nx\u202e" in result.stdout
    assert len(spotune("cost", *SINCE).stdout.splitlines()) == 6  # header, run, sum, and two notes


def test_a_cluster_that_cannot_be_read_is_said(bucket: Store) -> None:
    bucket.write("clusters/dev-5.json", b'{"name": "dev", "spans": "x"}')
    line = "a dev cluster is left out: clusters/dev-5.json: not a ClusterRecord: spans: not a list"
    for arguments in (("--clusters",), ("--by", "user"), ("--format", "focus")):
        result = spotune("cost", *arguments, *SINCE)
        assert (result.exit_code, result.stderr.startswith(line)) == (0, True), result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_a_record_of_an_attempt_that_cannot_be_read_is_said(bucket: Store) -> None:
    bucket.write(KEYS.attempt(2), b'{"run')
    bucket.write(KEYS.progress, b"{")  # costs a certified run nothing
    for arguments in ((RUN_ID, "--format", "json"), SINCE):
        result = spotune("cost", *arguments)
        assert result.exit_code == 0
        assert f"{KEYS.attempt(2)}: not a AttemptRecord" in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_a_mark_that_cannot_be_read_is_one_by_being_there(bucket: Store) -> None:
    bucket.delete([KEYS.completed])
    bucket.write(KEYS.paused, b"{")
    bucket.write(KEYS.progress, b"{")
    (row,) = json.loads(spotune("queue", "-a", "--format", "json").stdout)
    assert (row["state"], row["reason"].partition(": not a")[0]) == ("PAUSED", KEYS.paused)
    bucket.delete([KEYS.paused])
    (row,) = json.loads(spotune("queue", "-a", "--format", "json").stdout)
    assert row["state"] == "FAILED"
    assert f"{KEYS.progress}: not a Progress" in row["reason"]


def test_an_empty_folder_is_no_run_and_no_suggestion_of_itself(bucket: Store, tmp_path: Path) -> None:
    (tmp_path / "home/bucket/runs/orders").mkdir()
    assert spotune("cost", "orders").stderr == f"orders: no such run (did you mean {RUN_ID}?)\n"


def test_a_bucket_that_does_not_answer_is_infrastructure(bucket: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(store: Store, key: str) -> bytes:
        raise StoreError(f"{store.url}/{key}: cannot read: timed out")

    monkeypatch.setattr(Store, "read", read)
    result = spotune("cost", RUN_ID)
    assert (result.exit_code, len(result.stderr.splitlines())) == (3, 1)
