"""Runs whose records were copied, cut or rewritten: one line names what is wrong, and the rest is shown."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from spotune.cli import main
from spotune.contracts.keys import Keys
from spotune.contracts.store import Store
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
    return CliRunner(mix_stderr=False).invoke(main, arguments)


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
        (edit(KEYS.run, prices=[{}]), RUN_ID, f"{KEYS.run}: prices: not a PriceRow: infra: missing"),
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
