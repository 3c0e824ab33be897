"""How long an engine may be silent."""

import pytest

from spotune.core.errors import InfraError
from spotune.launch.status import Outage


def test_an_outage_is_told_of_once_and_borne_for_a_while() -> None:
    now = [0.0]
    outage, error = Outage(60, clock=lambda: now[0]), InfraError("no answer")
    assert outage.bear(error)
    now[0] = 59
    assert not outage.bear(error)
    outage.end()
    now[0] = 100
    assert outage.bear(error)
    now[0] = 161
    with pytest.raises(InfraError):
        outage.bear(error)
