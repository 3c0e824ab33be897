"""A minute of the chaos tests, for every change: a few fixed seeds. The rest is ``make test-chaos``."""

from collections.abc import Callable

import pytest

from drill.schedule import Boundary, Instant, Kill
from tests.chaos.conftest import Ground


@pytest.mark.slow
def test_a_few_kills_leave_no_trace(ground: Callable[[str, str], Ground]) -> None:
    anywhere = (
        Kill("vanish", Instant("save", 0.4, nth=2), wipe=True),
        Kill("guard", Instant("start", 0.6), wipe=False),
        Kill("zombie", Instant("train", 0.3), wake=0.5),
    )
    boundaries = (
        Kill("vanish", Boundary("uploading"), wipe=False),
        Kill("vanish", Boundary("uploaded", nth=2), wipe=True),
        Kill("vanish", Boundary("restoring"), wipe=True),
        Kill("vanish", Boundary("result-uploaded"), wipe=False),
    )
    card = ground("lora", "file").play([anywhere, boundaries])
    assert card["kills"] == len(anywhere) + len(boundaries)
