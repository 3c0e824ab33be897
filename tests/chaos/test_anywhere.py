"""Killed anywhere, and at the first try as if nothing had happened: ``make test-chaos``."""

from collections.abc import Callable

import pytest

from drill.draw import draw_boundaries, draw_random
from drill.schedule import BOUNDARIES
from tests.chaos.conftest import KEEP, Ground

KILLS, PER_RUN = 36, 4  # random instants on each of six grounds: more than 200 in all
NOTICE_S = 30.0

pytestmark = pytest.mark.chaos


@pytest.fixture(scope="module", params=["file", "s3", "gs"])
def scheme(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=["lora", "full"])
def place(request: pytest.FixtureRequest, scheme: str, ground: Callable[[str, str], Ground]) -> Ground:
    return ground(request.param, scheme)


def test_at_every_boundary_of_the_protocol(place: Ground) -> None:
    card = place.play(draw_boundaries(place.rng, place.measure.pace.saves, KEEP, NOTICE_S))
    assert set(card["kills_by_instant"]) == set(BOUNDARIES)


def test_at_random_instants(place: Ground) -> None:
    card = place.play(draw_random(KILLS, PER_RUN, place.rng, NOTICE_S))
    assert card["kills"] >= KILLS - 2  # a kill that comes too late again and again is given up
    assert set(card["kills_by_instant"]) == {"start", "train", "save", "end"}
