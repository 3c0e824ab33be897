"""A cluster job's log: told once, through losses of the connection, and without a false end."""

import io
from collections.abc import Callable
from typing import Any

import pytest

from spotune.core.errors import InfraError
from spotune.launch.skypilot.jobs import WAITS_S, follow
from tests.unit.launch.skypilot.fake_sky import ClusterNotUpError, FakeSky, sky

__all__ = ["sky"]
HEAD = "├── Waiting for task resources on 1 node.\n└── Job started. Streaming logs...\n"


def tells(*lines: str, code: int | Exception = 0, end: str = "") -> Callable[[Any], int]:
    def look(stream: Any) -> int:
        for text in (HEAD, *(f"(demo, pid=7) {line}\n" for line in lines), end):
            print(text, end="", flush=True, file=stream)
        if isinstance(code, Exception):
            raise code
        return code

    return look


def test_a_connection_that_is_lost_tells_nothing_twice(sky: FakeSky) -> None:
    sky.tells = [
        tells("step 1", "step 2", code=ConnectionError("reset"), end="(demo, pid=7) ste"),
        tells(code=ConnectionError("reset")),
        tells("step 1", "step 2", "step 3", code=101),  # not finished: the server's own way to the cluster broke
        tells("step 1", "step 2", "step 3", "step 4"),
    ]
    out, slept = io.StringIO(), list[float]()
    assert follow("dev", 1, slept.append, out) == 0
    said = [line for line in out.getvalue().splitlines() if "pid=" in line]
    assert said == [f"(demo, pid=7) {text}" for text in ("step 1", "step 2", "ste", "step 3", "step 4")]
    assert slept == [*WAITS_S[:2], WAITS_S[0]], "something new: it is tried as often again"


def test_the_scripts_own_exit_code(sky: FakeSky) -> None:
    end = "ERROR: Job 1 failed with return code list: [7]\n"
    sky.tells = [tells("step 1", code=OSError("reset")), tells("step 1", code=100, end=end), tells(code=103)]
    out = io.StringIO()
    assert follow("dev", 1, lambda _: None, out) == 7
    assert follow("dev", 1, lambda _: None, out) == 1


def test_a_log_that_is_not_to_be_had_any_more(sky: FakeSky) -> None:
    sky.tells = [tells(code=OSError("unreachable"))] * (len(WAITS_S) + 1)
    slept = list[float]()
    says = r"dev: job 1 may go on, but cannot be seen from here: .*unreachable \(sky logs dev 1; sky cancel dev 1\)"
    with pytest.raises(InfraError, match=says):
        follow("dev", 1, slept.append, io.StringIO())
    assert slept == list(WAITS_S)
    sky.tells = [tells(code=ClusterNotUpError("dev is not up"))]
    with pytest.raises(InfraError, match="dev is not up"):
        follow("dev", 1, slept.append, io.StringIO())
    assert slept == list(WAITS_S), "it does not come back"


def test_nobody_reads_it(sky: FakeSky) -> None:
    sky.tells = [tells(code=BrokenPipeError())]
    with pytest.raises(BrokenPipeError):
        follow("dev", 1, lambda _: None, io.StringIO())
