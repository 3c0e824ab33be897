"""The shortest way through everything: a managed job from the shipped files, preempted once, ends as if it was not."""

import pytest

from tests.lab import nodes
from tests.lab.layout import Layout

pytestmark = pytest.mark.lab
STEPS = 80  # of the demo's 200: what takes long is what SkyPilot does around them


def test_a_managed_job_outlives_a_preemption(lab: Layout, launch, reference, demo) -> None:  # type: ignore[no-untyped-def]
    config = demo(STEPS)
    managed = launch("smoke", SPOTUNE_CONFIG=config)
    managed.wait_for_attempt(1, steps=30)
    (node,) = managed.nodes()
    nodes.preempt(lab, node, seconds=60)
    expected = reference(config)
    managed.wait_for_attempt(2)
    assert managed.wait_for_success() == expected
    first, second = managed.attempts()
    assert first.notices[:1] == ("SIGURG",), managed.story()
    assert second.restored == first.last_step, managed.story()
    assert managed.replayed() == [0, 0]
    assert managed.job.recoveries == 1
