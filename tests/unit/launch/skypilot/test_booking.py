"""What SkyPilot's report says of dev clusters, as records in the bucket: everything that needs no SkyPilot."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spotune.core.errors import InfraError
from spotune.core.records import read_clusters
from spotune.launch.settings import Workspace
from spotune.launch.skypilot import client
from spotune.launch.skypilot.clusters import book, book_names, book_open


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    environ = {"SPOTUNE_HOME": str(tmp_path / "home"), "SPOTUNE_USER": "ana"}
    return Workspace.open(environ, tmp_path)


def row(*spans: tuple[int, int | None], now: int = 2000, usd_per_hour: float = 0.36, **facts: Any) -> dict[str, Any]:
    """A row of ``cost_report``, asked for at ``now``."""
    duration = sum((now if end is None else end) - start for start, end in spans)
    resources = {"cloud": "AWS", "region": "us-east-1", "zone": "us-east-1a", "instance_type": "g6.xlarge"}
    given = {
        "name": "dev-ana", "cluster_hash": "h", "num_nodes": 2, "usage_intervals": list(spans), "duration": duration,
        "total_cost": duration / 3600 * 2 * usd_per_hour, "status": None if spans[-1][1] else "UP",
        "resources": SimpleNamespace(**resources, accelerators={"L4": 1}, use_spot=False),
    }  # fmt: skip
    return given | facts


def test_a_record_from_up_to_down(workspace: Workspace) -> None:
    book(workspace, [row((1000, None))], fail, lambda: 2000.0)
    (first,) = read_clusters(workspace.store())
    assert (first.name, first.owner, first.infra, first.nodes) == ("dev-ana", "ana", "aws/us-east-1/us-east-1a", 2)
    assert (first.accelerators, first.key, first.is_up) == ("L4:1", "clusters/dev-ana-1000.json", True)
    assert first.price_row
    assert (first.price_row.price_usd_per_hour, first.price_row.at) == (0.36, 2000.0)
    assert first.intervals() == [(1000.0, 2000.0)]
    stopped = row((1000, 2500), (3000, 3500), usd_per_hour=0.99)  # what it costs today is another matter
    book(workspace, [stopped], fail, lambda: 4000.0)
    (last,) = read_clusters(workspace.store())
    assert (last.price, last.owner, last.key) == (first.price, first.owner, first.key)
    assert (last.spans, last.is_up) == ([[1000.0, 2500.0], [3000.0, 3500.0]], False)
    book(workspace, [stopped], fail, lambda: 9000.0)
    assert read_clusters(workspace.store()) == [last]  # nothing new


def test_the_next_of_a_name_has_its_own_record_and_older_ones_are_not_made_up(workspace: Workspace) -> None:
    old = row((10, 20), cluster_hash="g")
    book(workspace, [old, row((1000, None))], fail, lambda: 2000.0)
    assert [record.launched_at for record in read_clusters(workspace.store())] == [1000.0]
    book(workspace, [row((1000, 2100)), row((3000, None), now=3100, cluster_hash="i")], fail, lambda: 3100.0)
    first, second = read_clusters(workspace.store(), ["dev-ana"])
    assert (first.is_up, second.is_up, second.launched_at) == (False, True, 3000.0)
    assert read_clusters(workspace.store(), ["dev"]) == []


def test_a_price_that_is_not_known_stays_so(workspace: Workspace) -> None:
    book(workspace, [row((1000, None), usd_per_hour=0.0)], fail, lambda: 2000.0)
    book(workspace, [row((1000, None))], fail, lambda: 3000.0)
    assert [record.price for record in read_clusters(workspace.store())] == [{}]
    book(workspace, [row((5000, None), now=5000, cluster_hash="i")], fail, lambda: 5000.0)  # no time, no price yet
    assert len(read_clusters(workspace.store())) == 1


def test_what_cannot_be_booked_is_one_line(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []

    def silent(names: list[str]) -> None:
        raise InfraError("SkyPilot: no answer")

    monkeypatch.setattr(client, "cost_rows", silent)
    book_names(workspace, ["dev-ana"], warnings.append)
    assert warnings == ["the cost of dev-ana is not booked: SkyPilot: no answer"]
    book_open(workspace, fail)  # nobody is asked where nothing is open
    book(workspace, [row((1000, None))], fail, lambda: 2000.0)
    book_open(workspace, warnings.append)
    assert len(warnings) == 2
    bucket = Path(workspace.env.bucket.removeprefix("file://"))
    (bucket / "clusters").rename(bucket / "gone")
    (bucket / "clusters").write_text("a file in the way")
    book(workspace, [row((1000, None))], warnings.append)
    assert len(warnings) == 3
    assert "\n" not in warnings[2]


def fail(message: str) -> None:
    raise AssertionError(message)
