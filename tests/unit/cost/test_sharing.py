"""A cluster's paid time is split, whoever was on it and for how long; none of it is lost or invented."""

import csv
import io
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotune.cli import main
from spotune.core.keys import Keys
from spotune.core.records import ClusterRecord, PriceRow
from spotune.core.store import Store
from spotune.cost.account import Use, cluster_at, part_of, price_of_part, split, split_all
from spotune.cost.dev_clusters import charged, cluster_rows, flat_rows, idle_of
from spotune.cost.tables import clusters_text
from tests.commands import cli_runner
from tests.unit.cost.cases import T, claim, event, phase, run, step
from tests.unit.cost.test_groups import attempt

PRICE = PriceRow(infra="aws", accelerators="L4:1", use_spot=False, price_usd_per_hour=0.72, source="SkyPilot")


def cluster(*spans: tuple[float, float | None], **facts: Any) -> ClusterRecord:
    """Times in seconds after T."""
    given: dict[str, Any] = {
        "name": "dev-ana", "cluster_hash": "h", "launched_at": T + spans[0][0], "owner": "ana", "team": "research",
        "infra": "aws/us-east-1", "accelerators": "L4:1", "price": vars(PRICE), "updated_at": T + 3600,
        "spans": [[T + start, None if end is None else T + end] for start, end in spans],
    }  # fmt: skip
    return ClusterRecord(**(given | facts))


def use(key: Any, start: float, end: float | None, gpu_share: float = 0.0, nodes: int = 1) -> Use:
    return Use(key, "dev-ana", T + start, None if end is None else T + end, gpu_share, nodes)


def test_two_halves_and_the_rest() -> None:
    """The example of docs/reference/cost.md: an hour at $0.72; half a GPU for 40 minutes, the rest for the last 20."""
    found = split(cluster((0, 3600)), [use("a", 600, 3000, 0.5), use("b", 1800, 3000, 0.5)])
    assert [(share.key, share.paid_s) for share in found.shares] == [("a", 1200.0), ("b", 600.0)]
    assert [share.cost_usd for share in found.shares] == pytest.approx([0.24, 0.12])
    assert (found.paid_s, found.idle_s) == (3600.0, 1800.0)
    assert (found.cost_usd, found.idle_usd) == pytest.approx((0.72, 0.36))
    assert (found.idle_since, found.idle_usd_per_hour) == (None, 0.0)


def test_runs_that_ask_for_too_much_share_in_proportion() -> None:
    found = split(cluster((0, 100), accelerators=""), [use("a", 0, 60), use("b", 20, 100)])
    assert [share.paid_s for share in found.shares] == [20 + 20, 20 + 40]
    assert found.idle_s == 0
    found = split(cluster((0, 100), accelerators="L4:2"), [use("a", 0, 100, 2.0), use("b", 0, 100, 1.0)])
    assert [share.paid_s for share in found.shares] == pytest.approx([200 / 3, 100 / 3])


def test_the_part_that_a_run_asks_for() -> None:
    two = cluster((0, 1), accelerators="L4:4", nodes=2)
    assert [part_of(two, share, 1) for share in (1.0, 4.0, 9.0, 0.0)] == [0.125, 0.5, 0.5, 0.5]
    assert part_of(two, 2.0, 2) == 0.5
    assert part_of(cluster((0, 1), accelerators="L4:0.5"), 0.5, 1) == 1.0


def test_time_while_a_cluster_was_stopped_is_not_paid() -> None:
    found = split(cluster((0, 100), (200, 300)), [use("a", 50, 250)])
    assert (found.paid_s, found.shares[0].paid_s, found.idle_s) == (200, 100, 100)


def test_the_cost_of_an_idle_part_now() -> None:
    up = cluster((0, 100), (200, None))
    idle = split(up, [use("a", 250, 900)])
    assert (idle.idle_since, idle.idle_usd_per_hour) == (T + 900, pytest.approx(0.72))
    assert split(up, [use("a", 20, 50)]).idle_since == T + 200
    half = split(up, [use("a", 250, None, 0.5)])
    assert (half.idle_since, half.idle_usd_per_hour) == (None, pytest.approx(0.36))
    assert split(up, [use("a", 250, None)]).idle_usd_per_hour == 0
    assert split(cluster((0, None), price={}), []).idle_usd_per_hour is None


def test_a_reused_name_is_another_cluster() -> None:
    first, second = cluster((0, 100)), cluster((200, 300), cluster_hash="i")
    uses = [use("a", 10, 50), use("b", 210, 260), use("c", 120, 150), Use("d", "other", T, T + 50)]
    assert [[share.key for share in one.shares] for one in split_all([first, second], uses)] == [["a"], ["b"]]
    assert first.key == f"clusters/dev-ana-{T:.0f}.json" != second.key
    assert cluster_at([first, second], "dev-ana", T - 1) is None


def test_a_part_has_its_part_of_the_price() -> None:
    half = price_of_part(cluster((0, 1), accelerators="L4:2"), 1.0)
    assert half
    assert (half.accelerators, half.price_usd_per_hour) == ("L4:1", 0.36)
    assert half.source == "SkyPilot, 50% of dev-ana"
    assert price_of_part(cluster((0, 1)), 0.0) == PRICE
    assert price_of_part(cluster((0, 1), price={}), 1.0) is None


TIMES = st.floats(0, 1e5)
SPANS = st.lists(st.tuples(TIMES, st.none() | TIMES), max_size=4)
USES = st.lists(st.tuples(TIMES, st.none() | TIMES, st.sampled_from([0, 0.25, 0.5, 1, 2, 8]), st.integers(0, 3)))


@given(SPANS, USES, st.sampled_from(["", "L4:1", "L4:2", "H100:8"]), st.integers(1, 3))
def test_the_parts_are_the_whole(
    spans: list[tuple[float, float | None]],
    uses: list[tuple[float, float | None, float, int]],
    accelerators: str,
    nodes: int,
) -> None:
    record = cluster(*(spans or [(0, 0)]), accelerators=accelerators, nodes=nodes, updated_at=T + 5e4)
    found = split(record, [use(index, *facts) for index, facts in enumerate(uses)])
    parts = [share.paid_s for share in found.shares]
    assert all(part >= 0 for part in (*parts, found.idle_s, found.paid_s))
    assert sum(parts) + found.idle_s == pytest.approx(found.paid_s, abs=1e-3)
    assert all(0 < piece.part <= 1 and piece.started_at < piece.ended_at for piece in found.idle)
    assert all(one.ended_at <= other.started_at for one, other in pairwise(found.idle))
    assert found.cost_usd is not None
    assert found.idle_usd is not None
    costs = [share.cost_usd for share in found.shares if share.cost_usd is not None]
    assert len(costs) == len(parts)
    assert sum(costs) + found.idle_usd == pytest.approx(found.cost_usd, abs=1e-6)
    assert 0 <= (found.idle_usd_per_hour or 0.0) <= 0.72 * nodes + 1e-9


def test_rows_and_text() -> None:
    key = ("b", "run-a")
    found = split_all([cluster((0, None))], [use((key, 1), 600, 1200), use((key, 2), 1200, 1800)])
    (row,) = cluster_rows(found, [(key, {"run_id": "run-a", "user": "ben", "team": "ops"})])
    assert [(one["run_id"], one["user"], one["paid_s"]) for one in row["runs"]] == [("run-a", "ben", 1200.0)]
    assert flat_rows([row])[0]["runs"] == 1
    text = clusters_text([row], T + 3600)
    assert "dev-ana of ana has been idle for 30m, burning $0.72/h now (spotune dev down dev-ana)." in text
    assert "That was 2h ago" in clusters_text([row], T + 3600 + 7200)
    assert max(map(len, text.splitlines())) <= 110


def test_no_dollar_is_counted_twice() -> None:
    """Two runs on a machine without a GPU, each of which would say that it had it whole."""
    found = split_all([cluster((0, 1000), accelerators="")], [use(("a", 1), 0, 600), use(("b", 1), 0, 600)])
    pairs = [(key, attempt(T, 600.0, cost_usd=0.12)) for key in "ab"]
    costs = [one["cost_usd"] for _, one in charged([*pairs, ("c", attempt(T, 1.0, cost_usd=9.0))], found)]
    assert costs == pytest.approx([0.06, 0.06, 9.0])
    (idle,) = idle_of(found)
    assert [idle[name] for name in ("user", "team", "kind", "infra")] == ["ana", "research", "dev", "aws"]
    assert (idle["started_at"], idle["paid_s"]) == (T + 600, 400)
    assert sum(costs[:2]) + idle["cost_usd"] == pytest.approx(0.2)


def focus(*arguments: str) -> list[dict[str, str]]:
    result = cli_runner().invoke(main, ["cost", *arguments, "--format", "focus"])
    assert result.exit_code == 0, result.output
    return list(csv.DictReader(io.StringIO(result.stdout)))


def cost(*arguments: str) -> Any:
    result = cli_runner().invoke(main, ["cost", *arguments, "--format", "json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_run_on_a_cluster_from_the_bucket_to_every_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store, keys = Store(f"file://{tmp_path}/home/bucket"), Keys("dev-run")
    there = cluster((0, 3600))
    store.write(there.key, there.to_bytes())
    store.create(keys.run, run(run_id="dev-run", user="ben", kind="dev", prices=[], infra="").to_bytes())
    record = claim(1, 600, cluster_name="dev-ana", infra="aws", region="us-east-1", gpu_share=0.5)
    store.create(keys.attempt(1), replace(record, run_id="dev-run").to_bytes())
    events = [phase(600, "load"), phase(700, "train"), step(2000, 1), event(3000, "end", reason="completed")]
    store.create(keys.events(1, 0, 0), "\n".join(map(json.dumps, events)).encode())

    report = cost("dev-run")
    assert (report["paid_s"], report["cost_usd"], report["unpriced_s"]) == (2400.0, pytest.approx(0.24), 0.0)
    assert report["attempts"][0]["accelerators"] == "L4:0.5"
    (row,) = cost("--clusters", "--since", "9999d")
    assert (row["runs"][0]["run_id"], row["runs"][0]["cost_usd"]) == ("dev-run", pytest.approx(report["cost_usd"]))
    assert (row["idle_usd"], row["is_up"]) == (pytest.approx(0.48), False)
    assert cost("--clusters", "--since", "1s") == []
    groups = {one["user"]: one for one in cost("--by", "user", "--since", "9999d")}
    assert groups["ben"]["cost_usd"] == pytest.approx(0.24)
    assert (groups["ana"]["cost_usd"], groups["ana"]["idle_usd"]) == (0.0, pytest.approx(0.48))
    assert groups["ana"]["runs"] == 0
    for by in ("team", "kind", "infra", "gpu", "day", "week"):
        rows = cost("--by", by, "--since", "9999d")
        assert sum(one["cost_usd"] + one["idle_usd"] for one in rows) == pytest.approx(0.72), by
    charges = [(charge["ResourceName"], float(charge["BilledCost"])) for charge in focus("--since", "9999d")]
    # The run's half; ten minutes whole, the other half while the run was on it, and ten minutes whole again.
    assert [name for name, _ in charges] == ["dev-run", "dev-ana", "dev-ana", "dev-ana"]
    assert [usd for _, usd in charges] == pytest.approx([0.24, 0.12, 0.24, 0.12])
