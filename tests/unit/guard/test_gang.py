"""Two machines as one attempt: the leader and a follower over loopback, in one process."""

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import pytest

from spotune.core.errors import StoreError
from spotune.core.protocol import Outcome
from spotune.guard.journal import Node
from spotune.guard.leaving import Notices
from spotune.guard.multinode import Leader, Line, join
from spotune.guard.ranks import Work
from tests.waiting import LIMIT_S, until

FACTS = {"size": 1, "sha256": "0" * 64}
JOB = {"run_id": "pair", "attempt": 1, "config": {"max_steps": 8}, "config_path": "c", "cache": ""}
WELCOME = {"job": JOB, "master_port": 1, "environ": {"WANDB_MODE": "offline"}, "sample_s": 0.5}


def machine(node: int) -> Node:
    return Node.read({
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": str(node),
        "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1",
    })  # fmt: skip


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as made:
        yield made


@pytest.fixture
def pair(pool: ThreadPoolExecutor) -> Iterator[tuple[Leader, Line]]:
    """A leader and its follower's line, with the welcome said."""
    run_id = f"pair-{uuid4().hex[:8]}"
    leader = Leader(run_id, machine(0), "token")
    joined = pool.submit(join, run_id, machine(1), "token")
    leader.gather(Notices(), **WELCOME)
    line, job, welcome = joined.result(LIMIT_S)
    assert (job.attempt, job.config, vars(welcome)) == (1, {"max_steps": 8}, WELCOME)
    yield leader, line
    leave(line)
    leader.close(0)


def leave(line: Line) -> None:
    """The follower's machine is gone."""
    if not line.gone:
        line._socket.shutdown(socket.SHUT_RDWR)
    line.close()


def test_a_commit_has_the_files_of_all_machines(pair: tuple[Leader, Line], pool: ThreadPoolExecutor) -> None:
    leader, line = pair
    parts = pool.submit(leader.parts, 5)
    assert line.next(LIMIT_S) == {"upload": 5}
    assert not parts.done()
    line.send(part=4, files={"old": FACTS})
    line.send(part=5, files={"rng_state_1.pth": FACTS})
    assert parts.result(LIMIT_S) == {"rng_state_1.pth": FACTS}


def test_without_the_files_of_a_machine_there_is_no_commit(pair: tuple[Leader, Line], pool: ThreadPoolExecutor) -> None:
    leader, line = pair
    parts = pool.submit(leader.parts, 5)
    assert line.next(LIMIT_S) == {"upload": 5}
    leave(line)
    with pytest.raises(StoreError, match="step 5: not all machines have uploaded their part"):
        parts.result(LIMIT_S)
    assert leader.lost


def test_a_machine_that_has_said_how_it_ended_is_not_lost(pair: tuple[Leader, Line]) -> None:
    leader, line = pair
    line.send(notice="SIGTERM", left_s=20.0)
    line.send(ended={"how": "stopped", "step": 5, "message": ""})
    assert leader.wait_for_outcomes(LIMIT_S) == [Outcome("stopped", 5)]
    assert leader.notice == ("SIGTERM on node 1", 20.0)
    leave(line)
    until(lambda: leader._lines[1].gone)
    assert not leader.lost


def test_the_follower_hears_how_the_attempt_ended(pair: tuple[Leader, Line]) -> None:
    leader, line = pair
    leader.broadcast(end=75)
    assert line.next(LIMIT_S) == {"end": 75}


def test_followers_say_what_their_ranks_do_and_are_asked_for_stacks(
    pair: tuple[Leader, Line], pool: ThreadPoolExecutor
) -> None:
    leader, line = pair
    assert leader.works == []
    line.send(work={"cpu_s": 1.5, "moved_bytes": 20, "stopped": True})
    until(lambda: leader.works)
    assert leader.works == [Work(1.5, 20, stopped=True)]
    leader.broadcast(stacks=True)
    assert line.next(LIMIT_S) == {"stacks": True}
    waiting = pool.submit(leader.wait_for_stacks, LIMIT_S)
    line.send(stacks=[1])
    waiting.result(LIMIT_S)


def test_a_follower_that_is_gone_is_not_waited_for(pair: tuple[Leader, Line]) -> None:
    leader, line = pair
    leader.broadcast(stacks=True)
    leave(line)
    leader.wait_for_stacks(LIMIT_S)


def test_stacks_are_waited_for_no_longer_than_said(pair: tuple[Leader, Line]) -> None:
    leader, _ = pair
    leader.broadcast(stacks=True)
    leader.wait_for_stacks(0.01)
