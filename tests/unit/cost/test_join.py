"""Rows and claims are paired by time, in order, though clocks differ and some of either are missing."""

import pytest

from spotune.core.records import AttemptRecord
from spotune.cost.machines import join
from spotune.launch.engine import PaidInterval
from tests.unit.cost.cases import T, claim, row

Rows = list[tuple[float, float | None]]
Pairs = list[tuple[bool, int | None]]


def pairs(rows: Rows, claims: list[float], now: float = 9999) -> Pairs:
    machines = join(
        [row(start, end) for start, end in rows], [claim(index, at) for index, at in enumerate(claims, 1)], T + now
    )
    return [(machine.interval is not None, machine.record and machine.record.attempt) for machine in machines]


@pytest.mark.parametrize(
    ("rows", "claims", "expected"),
    [
        ([(0, 10), (20, 30)], [1, 21], [(True, 1), (True, 2)]),
        ([(0, 10), (20, 30), (40, 50)], [1, 41], [(True, 1), (True, None), (True, 2)]),
        ([(0, 10), (20, 30)], [21], [(True, None), (True, 1)]),
        ([(20, 30)], [1, 21], [(False, 1), (True, 2)]),
        ([(0, 10), (20, 30)], [181, 201], [(True, 1), (True, 2)]),  # the machines' clocks are 3 minutes ahead
        ([(0, 10), (20, 30)], [-100, -80], [(True, 1), (True, 2)]),
        ([(0, 10)], [5000], [(True, None), (False, 1)]),  # too far apart to belong together
        ([(0, 10), (20, None)], [1, 500], [(True, 1), (True, 2)]),
        ([], [1], [(False, 1)]),
        ([], [], []),
    ],
)
def test_pairs(rows: Rows, claims: list[float], expected: Pairs) -> None:
    assert pairs(rows, claims) == expected


def test_unclaimed_machines_get_the_free_numbers() -> None:
    rows = [PaidInterval("r", started, started + 9, "local") for started in (0, 20, 40, 60)]
    second, fourth = (AttemptRecord(run_id="r", attempt=n, claimed_at=t, claim_id="") for n, t in ((2, 21), (4, 61)))
    assert [machine.attempt for machine in join(rows, [second, fourth], 100)] == [1, 2, 3, 4]
    first = AttemptRecord(run_id="r", attempt=1, claimed_at=61, claim_id="")
    assert [machine.attempt for machine in join(rows, [first], 100)] == [None, None, None, 1]


def test_hundreds_of_attempts_are_paired_in_order() -> None:
    rows: Rows = [(100.0 * n, 100.0 * n + 80) for n in range(300)]
    assert pairs(rows, [100.0 * n + 5 for n in range(300)], now=1e6) == [(True, n) for n in range(1, 301)]


def test_a_bill_decides_the_attempt_whatever_the_clocks_say() -> None:
    first, second = row(0, 60), row(100, 160)
    hour_off = [claim(1, 3605), claim(2, 3705)]
    machines = join([], hour_off, T + 9999, [(1, first), (2, second)])
    assert [(one.interval, one.record, one.attempt) for one in machines] == [
        (first, hour_off[0], 1), (second, hour_off[1], 2),
    ]  # fmt: skip


def test_a_billed_machine_without_a_claim_does_not_take_a_near_one() -> None:
    lost, billed = row(0, 90), row(110, 400)
    behind = claim(1, -17)
    machines = join([], [behind], T + 9999, [(1, billed), (0, lost)])
    assert [(one.interval, one.record, one.attempt) for one in machines] == [(lost, None, None), (billed, behind, 1)]


def test_an_unbilled_row_keeps_its_place_between_billed_rows() -> None:
    rows = [row(start, start + 10) for start in (0, 20, 40, 60)]
    ahead = [claim(number, at) for number, at in enumerate((41, 61, 81, 101), 1)]  # by 40 s
    machines = join([rows[1], rows[3]], ahead, T + 9999, [(1, rows[0]), (3, rows[2])])
    assert [one.attempt for one in machines] == [1, 2, 3, 4]
    assert [one.interval for one in machines] == rows
    alone = join([rows[3]], ahead[:2], T + 9999, [(2, rows[2])])  # what came after the second is not the first
    assert [(one.interval, one.attempt) for one in alone] == [(None, 1), (rows[2], 2), (rows[3], 3)]


def test_attempts_without_a_row_keep_their_order_though_clocks_differ() -> None:
    ahead, behind = claim(1, 299), claim(2, 159)
    assert [one.attempt for one in join([], [ahead, behind], T + 9999)] == [1, 2]
    late = row(3000, 3090)
    assert [one.attempt for one in join([late], [ahead, behind], T + 9999)] == [1, 2, 3]
    first, third = row(100, 200), row(300, 400)
    machines = join([third], [claim(1, 110), claim(2, 90), claim(3, 310)], T + 9999, [(1, first)])
    assert [one.attempt for one in machines] == [1, 2, 3]
    rows = [row(2000, 2010), row(6000, 6010)]  # neither claimed
    assert [one.attempt for one in join(rows, [claim(4, 4000)], T + 9999)] == [1, 4, 5]


def test_a_number_is_given_once() -> None:
    copied = join([], [claim(1, 1)], T + 9999, [(1, row(0, 10)), (1, row(20, 30)), (0, row(40, 50))])
    assert [(one.record is not None, one.attempt) for one in copied] == [(True, 1), (False, 2), (False, 3)]
