"""Every verb over a store that fails, by a fake clock: how long it holds out, and what it sends again."""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from spotune.core.errors import StoreError
from spotune.core.store import RetryPolicy, objects
from tests import fake_objects
from tests.clocks import Loops
from tests.fake_objects import PART_BYTES, FakeApi, at_random, fail, file_of, first, hang, store_of
from tests.store_verbs import VERBS, use_every_verb

Meets = Callable[[str], Awaitable[None]]
DEFAULT = RetryPolicy()
X = "fake/x/runs/a/x"


@pytest.fixture(autouse=True)
def short_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "RANGE_BYTES", PART_BYTES)


def later(seconds: float) -> Meets:
    async def wait(name: str) -> None:
        await asyncio.sleep(seconds)

    return wait


ALL = {"before": {"reset": fail, "hang": hang, "delay": later(10.0)}, "after": {"lost": fail, "answer hangs": hang}}
FAULTS = [(when, name) for when, faults in ALL.items() for name in faults]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("when", "name"), FAULTS)
def test_every_verb_gets_through(when: str, name: str, seed: int, tmp_path: Path) -> None:
    api, loops = FakeApi(), Loops()
    setattr(api, when, at_random(ALL[when][name], 0.3, seed))
    use_every_verb(store_of(api, DEFAULT, loops), file_of(tmp_path, 3))
    assert loops.now > 0
    assert when == "after" or not api.uploads  # an upload whose beginning was never answered stays until it is swept


def test_without_faults_no_time_passes_and_nothing_is_sent_twice(tmp_path: Path) -> None:
    api, loops = FakeApi(), Loops()
    use_every_verb(store_of(api, DEFAULT, loops), file_of(tmp_path, 3))
    assert loops.now == 0
    assert [api.seen.count(f"part {n}") for n in (1, 2, 3)] == [2, 2, 2]  # two files


@pytest.mark.parametrize("fault", [fail, hang], ids=["reset", "hang"])
@pytest.mark.parametrize("verb", VERBS)
def test_a_store_that_stays_away_ends_every_verb_in_time(verb: str, fault: Meets, tmp_path: Path) -> None:
    api, loops = FakeApi(), Loops()
    api.objects[X] = b"1", "token"
    store, big = store_of(api, DEFAULT, loops), file_of(tmp_path, 3)
    api.before = fault
    with pytest.raises(StoreError, match=r"^s3://fake/x/runs/a\S*: cannot .* \(\d+ tries in \d+ s\)$"):
        VERBS[verb](store, big)
    took_s = loops.now
    size = PART_BYTES if verb == "download" else 256 << 10 if verb == "read" else 0
    longest_wait = DEFAULT.longest_wait_s
    tidying_s = DEFAULT.request_s
    limit_s = DEFAULT.limit_s(size)
    assert limit_s - longest_wait - DEFAULT.try_s(size) <= took_s <= limit_s + tidying_s
    api.before = fake_objects.well
    assert store.keys("runs") == ["runs/a/x"]  # nothing half-written is visible, and the store is usable again
    assert not big.with_name("back").exists()
    assert store.read("runs/a/x") == b"1"


def test_a_store_that_comes_back_is_used_again() -> None:
    api, loops = FakeApi(), Loops()
    api.objects[X] = b"1", "token"

    async def away(name: str) -> None:
        if loops.now < 40.0:
            raise ConnectionRefusedError

    api.before = away
    assert store_of(api, DEFAULT, loops).read("runs/a/x") == b"1"
    assert 40.0 <= loops.now <= 40.0 + DEFAULT.longest_wait_s


def test_a_transfer_that_makes_progress_has_no_deadline(tmp_path: Path) -> None:
    """Each request is within its limit; all together take longer than any of them may."""
    api, loops = FakeApi(parts_in_flight=1), Loops()
    api.before = later(14.0)
    store, big = store_of(api, DEFAULT, loops), file_of(tmp_path, 12)
    store.upload(big, "runs/a/big")
    assert loops.now > DEFAULT.limit_s(PART_BYTES) + DEFAULT.request_s
    assert len(api.seen) == 12 + 3  # begin, finish, and a look at what is stored: each once
    store.download("runs/a/big", tmp_path / "back")
    assert len(api.seen) == 12 + 3 + 12


def test_a_record_is_not_waited_for_like_a_large_file(tmp_path: Path) -> None:
    api, loops = FakeApi(), Loops()
    api.objects[X] = b"1", "token"
    api.before = hang
    store = store_of(api, DEFAULT, loops)
    with pytest.raises(StoreError, match="runs/a/x: cannot read"):
        store.read("runs/a/x")
    for_a_record = loops.now
    assert for_a_record <= DEFAULT.limit_s(256 << 10)
    with pytest.raises(StoreError, match="runs/a/x: cannot download"):
        store.download("runs/a/x", tmp_path / "x")
    assert loops.now - for_a_record > DEFAULT.limit_s(256 << 10)


def test_a_slow_link_is_not_hung(tmp_path: Path) -> None:
    """A part takes longer than a request may be silent, and is not cut. Slower still, it is hung at first."""
    api, loops = FakeApi(), Loops()
    size = PART_BYTES - 7  # of the last part
    api.before = first(later(DEFAULT.try_s(size, 1) - 0.1), "part 1", times=100)
    store, big = store_of(api, DEFAULT, loops), file_of(tmp_path, 3)
    store.upload(big, "runs/a/big")
    assert DEFAULT.try_s(size, 1) - 0.1 > DEFAULT.request_s
    assert api.seen.count("part 1") == 1
    api.before = first(later(DEFAULT.try_s(size, 3) - 0.1), "part 1", times=100)
    store.upload(big, "runs/a/big")
    assert api.seen.count("part 1") == 1 + 3


@pytest.mark.parametrize("when", ["before", "after"])
def test_only_the_parts_that_failed_are_sent_again(when: str, tmp_path: Path) -> None:
    api = FakeApi()
    setattr(api, when, first(fail, "part 2"))
    store, big = store_of(api, DEFAULT, Loops()), file_of(tmp_path, 3)
    store.upload(big, "runs/a/big")
    assert [api.seen.count(f"part {n}") for n in (1, 2, 3)] == [1, 2, 1]
    assert api.objects["fake/x/runs/a/big"][0] == big.read_bytes()


def test_an_upload_that_fails_leaves_no_parts_to_be_paid_for(tmp_path: Path) -> None:
    api = FakeApi()
    api.before = first(fail, "part 2", times=10**6)
    store = store_of(api, DEFAULT, Loops())
    with pytest.raises(StoreError, match=r"runs/a/big: cannot upload: .*cut \(\d+ tries"):
        store.upload(file_of(tmp_path, 3), "runs/a/big")
    assert api.uploads == []
    assert (api.seen.count("begin"), api.seen.count("abort")) == (1, 1)


def test_an_upload_ends_in_time_where_it_cannot_even_be_removed(tmp_path: Path) -> None:
    api, loops = FakeApi(), Loops()
    api.before = hang_in("part 2", "abort")
    with pytest.raises(StoreError, match="runs/a/big: cannot upload"):
        store_of(api, DEFAULT, loops).upload(file_of(tmp_path, 3), "runs/a/big")
    assert loops.now <= DEFAULT.limit_s(PART_BYTES) + DEFAULT.request_s


def hang_in(*names: str) -> Meets:
    async def meet(name: str) -> None:
        if name in names:
            await hang(name)

    return meet


@pytest.mark.parametrize(("request_name", "verb"), [("put", "create"), ("finish", "upload_new")])
def test_of_a_create_whose_answer_was_lost_the_winner_knows(request_name: str, verb: str, tmp_path: Path) -> None:
    api, big = FakeApi(), file_of(tmp_path, 3)
    api.after = first(fail, request_name)
    assert VERBS[verb](store_of(api, DEFAULT, Loops()), big) is True
    assert api.seen.count(request_name) == 2
    assert VERBS[verb](store_of(api, DEFAULT, Loops()), big) is False


def test_a_second_answer_does_not_hide_who_won(tmp_path: Path) -> None:
    """Where the end of an upload is tried again, a store may say that the key is taken: by the first try."""
    api = FakeApi()
    api.after = first(taken, "finish")
    assert store_of(api, DEFAULT, Loops()).upload_new(file_of(tmp_path, 3), "runs/a/big")


async def taken(name: str) -> None:
    raise FileExistsError(name)


@pytest.mark.parametrize("verb", ["create", "upload_new"])
def test_whoever_comes_second_is_told_so(verb: str, tmp_path: Path) -> None:
    """Somebody else writes the key after it was looked up, and before our write arrives."""
    api = FakeApi()

    async def overtake(name: str) -> None:
        api.objects.setdefault("fake/x/runs/a/y", (b"theirs", "their token"))

    api.before = first(overtake, "put" if verb == "create" else "finish")
    assert VERBS[verb](store_of(api, DEFAULT, Loops()), file_of(tmp_path, 3)) is False
    assert api.objects["fake/x/runs/a/y"][0] == b"theirs"


def test_a_flipped_bit_is_seen(tmp_path: Path) -> None:
    api, big = FakeApi(), file_of(tmp_path, 3)
    store = store_of(api, DEFAULT, Loops())
    store.upload(big, "runs/a/big")
    data, token = api.objects["fake/x/runs/a/big"]
    flipped = data[:-1] + bytes([data[-1] ^ 4])
    api.objects["fake/x/runs/a/big"] = flipped, token
    facts = store.download("runs/a/big", tmp_path / "back")
    assert facts == {"size": len(data), "sha256": hashlib.sha256(flipped).hexdigest()}


def test_what_is_overwritten_while_it_is_read_is_not_mixed(tmp_path: Path) -> None:
    api, big = FakeApi(), file_of(tmp_path, 3)
    store = store_of(api, DEFAULT, Loops())
    store.upload(big, "runs/a/big")

    reads: list[Any] = []

    async def overwrite(name: str) -> None:
        reads.append(name)
        if len(reads) == 2:
            api.objects["fake/x/runs/a/big"] = bytes(big.stat().st_size), "another"

    api.before = overwrite
    with pytest.raises(StoreError, match="overwritten while it was read"):
        store.download("runs/a/big", tmp_path / "back")
    assert not (tmp_path / "back").exists()
