"""``spotune cost`` on a bucket, with no engine that knows its runs."""

import json
from pathlib import Path

import pytest
from click.testing import Result

from spotune.cli import main
from spotune.core.store import Store
from spotune.cost.account import bills_due, build_accounts, write_bills
from tests.commands import cli_runner
from tests.unit.cost.cases import RUN_ID, T, three_attempts
from tests.unit.cost.test_read import write


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.chdir(tmp_path)
    store = Store(f"file://{tmp_path}/home/bucket")
    write(store, three_attempts())
    return store


def bill(store: Store) -> None:
    """As whoever knows the engine's rows does it."""
    run_data = three_attempts()
    write_bills(store, bills_due(run_data, build_accounts(run_data, T)))


def cost(*arguments: str) -> Result:
    return cli_runner().invoke(main, ["cost", *arguments])


def test_a_run_as_json_and_page(bucket: Store, tmp_path: Path) -> None:
    result = cost(RUN_ID, "--format", "json", "--html", "page.html")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["state"], report["useful_steps"]) == ("SUCCEEDED", 6)
    assert report["unreconciled_s"] == pytest.approx(report["paid_s"])
    assert "own clock" in (tmp_path / "page.html").read_text()


def test_all_runs(bucket: Store) -> None:
    assert json.loads(cost("--since", "9999d", "--format", "json").stdout)[0]["run_id"] == RUN_ID
    assert cost("--since", "9999d", "--format", "csv").stdout.startswith("run_id,state,")
    assert "1 run" in cost("--since", "9999d").stdout
    assert json.loads(cost("--since", "1s", "--format", "json").stdout) == []
    assert "No runs within 1s" in cost("--since", "1s").stdout


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["orders-k3x8"], f"orders-k3x8: no such run (did you mean {RUN_ID}?)"),
        (["--html", "page.html"], "--html: shows one run (spotune cost RUN --html FILE)"),
        ([RUN_ID, "--html", "."], "--html: . is a folder (--html cost.html)"),
        ([RUN_ID, "--by", "team"], "--by: cannot sum one RUN (spotune cost --by team)"),
        (
            ["--by", "team", "--format", "focus"],
            "--by: cannot sum FOCUS rows: each is one charge (spotune cost --by team)",
        ),
        (["--clusters", RUN_ID], "--clusters: lists all clusters, not one RUN (spotune cost --clusters)"),
        (["--clusters", "--by", "team"], "--clusters: is a table of its own (spotune cost --clusters)"),
        (["--clusters", "--format", "focus"], "--clusters: is a table of its own (spotune cost --clusters)"),
        (["--since", "soon"], "--since: 'soon' is not a duration (30s, 5m, 1.5h or 2d)"),
    ],
)
def test_bad_input_is_one_line(bucket: Store, arguments: list[str], line: str) -> None:
    result = cost(*arguments)
    assert (result.exit_code, result.stdout, result.stderr.strip()) == (2, "", line)


def test_an_empty_run_name_is_refused(bucket: Store) -> None:
    result = cost("")
    assert (result.exit_code, result.stdout) == (2, "")


def test_chargeback_and_focus(bucket: Store) -> None:
    bill(bucket)
    (row,) = json.loads(cost("--by", "team", "--since", "9999d", "--format", "json").stdout)
    assert (row["team"], row["runs"], row["attempts"]) == ("research", 1, 3)
    assert row["paid_s"] == pytest.approx(json.loads(cost(RUN_ID, "--format", "json").stdout)["paid_s"])
    assert "research" in cost("--by", "team", "--since", "9999d").stdout
    every, one = cost("--since", "9999d", "--format", "focus").stdout, cost(RUN_ID, "--format", "focus").stdout
    assert every == one
    assert len(one.splitlines()) == 4
    assert len(cost("--since", "1s", "--format", "focus").stdout.splitlines()) == 1  # the columns' names
