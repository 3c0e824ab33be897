"""Schedules are drawn from a seed, hit everything, and can be played in their order."""

import json
import re
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drill.day import Day
from drill.draw import BOUNDARY_RUNS, draw_boundaries, draw_random, for_plain, once_more
from drill.schedule import BOUNDARIES, EXTRAS, FAULTS, STAGES, After, Boundary, Instant, Kill, Run
from drill.trace import intervals, read_trace, trace_run
from spotune.core.errors import InputError
from spotune.core.io import failpoint

ROOT = Path(__file__).parents[3]


def test_the_boundaries_are_those_of_the_protocol() -> None:
    named = re.findall(r"(?m)^        ([a-z-]+) ", failpoint.__doc__ or "")
    assert tuple(named) == BOUNDARIES + EXTRAS
    assert sorted(name for run in BOUNDARY_RUNS for name in run) == sorted(BOUNDARIES)


def test_every_boundary_is_reached_somewhere_in_the_product() -> None:
    source = "\n".join(path.read_text() for path in (ROOT / "src" / "spotune").rglob("*.py"))
    assert set(re.findall(r'\bfailpoint\("([a-z-]+)"\)', source)) == set(BOUNDARIES + EXTRAS)


def draw(seed: int, count: int, per_run: int) -> list[Run]:
    return draw_random(count, per_run, Random(seed), notice_s=30.0)


@given(seed=st.integers(), count=st.integers(1, 200), per_run=st.integers(1, 8))
def test_random_instants(seed: int, count: int, per_run: int) -> None:
    runs = draw(seed, count, per_run)
    assert runs == draw(seed, count, per_run)
    kills = [kill for run in runs for kill in run]
    assert len(kills) == count
    assert all(len(run) <= per_run for run in runs)
    stages = Counter(kill.when.stage for kill in kills if isinstance(kill.when, Instant))
    assert max(stages[stage] for stage in STAGES) - min(stages[stage] for stage in STAGES) <= 1
    for run in runs:
        late = [isinstance(kill.when, Instant) and kill.when.stage == "end" for kill in run]
        assert late == sorted(late)  # nothing comes after a run's end
        assert sum(kill.kind in FAULTS for kill in run) <= 1
    for kill in kills:
        assert isinstance(kill.when, Instant)
        assert 0 <= kill.when.at <= 1
        assert (kill.kind == "notice") >= (kill.notice_s > 0)


def test_another_seed_is_another_day_and_all_kinds_come() -> None:
    assert draw(1, 20, 4) != draw(2, 20, 4)
    kills = [kill for run in draw(3, 400, 4) for kill in run]
    assert {kill.kind for kill in kills} == {"vanish", "notice", "guard", "worker", "loader", "zombie"}
    assert 0.4 < sum(kill.wipe for kill in kills) / 400 < 0.6
    spread = sorted(kill.when.at for kill in kills if isinstance(kill.when, Instant) and kill.when.stage == "start")
    assert spread[0] < 0.1
    assert spread[-1] > 0.9


def test_kills_that_came_too_late_come_sooner() -> None:
    kills = [kill for run in draw(5, 40, 4) for kill in run]
    again = once_more([*kills, Kill("vanish", After(3.0))], 4)
    assert [len(run) for run in again] == [4] * 10  # a trace's are over for good
    shares = sorted(kill.when.at for kill in kills if isinstance(kill.when, Instant))
    halved = sorted(kill.when.at for run in again for kill in run if isinstance(kill.when, Instant))
    assert halved == pytest.approx([share / 2 for share in shares], abs=1e-4)
    assert all(sum(kill.kind in FAULTS for kill in run) <= 1 for run in again)


@given(seed=st.integers())
def test_boundaries_once_each_where_they_can_be_reached(seed: int) -> None:
    def names(saves: int, keep: int) -> list[str]:
        runs = draw_boundaries(Random(seed), saves, keep, 30.0)
        return [str(kill.when) for run in runs for kill in run if isinstance(kill.when, Boundary)]

    assert sorted(names(12, 2)) == sorted(BOUNDARIES)
    assert sorted(names(3, 2)) == sorted(set(BOUNDARIES) - {"pruning"})  # nothing is ever pruned
    (first, second) = draw_boundaries(Random(seed), 3, 2, 30.0)
    assert {kill.when.nth for kill in (*first, *second) if isinstance(kill.when, Boundary)} == {1}
    assert str(second[0].when) == "committed"  # what is restored after it has to be there


@given(seed=st.integers())
def test_plain_has_the_same_moments_without_our_boundaries(seed: int) -> None:
    rng = Random(seed)
    for run in [*draw(seed, 16, 4), *draw_boundaries(rng, 12, 2, 30.0)]:
        plain = for_plain(run, rng)
        assert len(plain) == len(run)
        assert {kill.kind for kill in plain} <= {"vanish", "notice"}
        assert not any(kill.wipe for kill in plain)
        assert all(isinstance(kill.when, Instant) for kill in plain)
        kept = [kill.when for kill in run if isinstance(kill.when, Instant)]
        assert [kill.when for kill in plain if kill.when in kept] == kept


def test_a_trace_is_cut_into_times_up_and_down() -> None:
    counts = [0, 0, 1, 2, 1, 0, 0, 1, 0, 3, 3]
    assert intervals(600, counts) == [(1800, 1200), (600, 600)]
    run = trace_run(600, counts, 60.0, 0.0, Random(0))
    assert [(kill.when, kill.down_s, kill.kind) for kill in run] == [
        (After(30.0), 20.0, "vanish"),
        (After(10.0), 10.0, "vanish"),
    ]
    assert trace_run(600, counts, 60.0, 2.0, Random(0))[0].kind == "notice"
    assert intervals(600, [1, 1]) == []


def test_a_trace_from_its_file(tmp_path: Path) -> None:
    good = tmp_path / "zone@1.json"
    good.write_text(json.dumps({"metadata": {"gap_seconds": 3600}, "data": [1, 0, 1]}))
    assert read_trace(good) == (3600.0, [1, 0, 1])
    for content in ("{", '{"data": [1]}', '{"metadata": {"gap_seconds": 60}, "data": [0]}'):
        (tmp_path / "bad").write_text(content)
        with pytest.raises(InputError, match="bad: "):
            read_trace(tmp_path / "bad")
    with pytest.raises(InputError, match="no such file"):
        read_trace(tmp_path / "none")


@pytest.mark.parametrize("schedule", ["random", "random:x", "random:0", "boundaries:3", "trace:", "trace", "now"])
def test_a_schedule_that_is_none(schedule: str) -> None:
    with pytest.raises(InputError, match="--schedule: .*trace:FILE"):
        Day(config="x.yaml", schedule=schedule)
