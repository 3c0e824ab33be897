"""The bucket's verbs against stores that fail: they get through, or end in time with one line that names the key."""

import hashlib
import os
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Event

import pytest

from spotune.cli import main
from spotune.contracts.errors import InputError, StoreError
from spotune.contracts.store import Patience, Store, connection
from spotune.contracts.store.faults import GaveUp
from spotune.contracts.store.objects import RANGE_BYTES
from tests.commands import cli_runner
from tests.conftest import reach
from tests.faultproxy import FaultProxy, Plan

QUICK = Patience(request_s=1.0, deadline_s=60.0, floor_bytes_per_s=2 << 20, first_wait_s=0.05, longest_wait_s=0.4)
SHORT = Patience(request_s=10.0, deadline_s=1.5, floor_bytes_per_s=32 << 20, first_wait_s=0.05, longest_wait_s=0.2)
STEADY = Patience(first_wait_s=0.05)  # where requests are counted: none is given up for being slow
BIG = (24 << 20) - 7  # two ranges, and three parts


@pytest.fixture(params=["s3", "gs"])
def scheme(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def proxy(scheme: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy in front of the store of ``scheme``, with the environment that leads to it."""
    reach(scheme, request, monkeypatch)
    Store(f"{scheme}://spotune/any").exists("runs/a/any")  # the clients are imported before anything is timed
    name = "AWS_ENDPOINT_URL" if scheme == "s3" else "STORAGE_EMULATOR_HOST"
    with FaultProxy(os.environ[name]) as made:
        monkeypatch.setenv(name, made.url)
        yield made


@pytest.fixture
def url(scheme: str, tmp_path: Path) -> str:
    return f"{scheme}://spotune/{tmp_path.name}-{time.time_ns()}"


@pytest.fixture
def big(tmp_path: Path) -> Path:
    path = tmp_path / "big"
    path.write_bytes(os.urandom(BIG))
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def use_every_verb(store: Store, big: Path) -> None:
    """Every verb, with the results that a store without faults gives."""
    small = big.with_name("small")
    small.write_bytes(b"small")
    store.write("runs/a/x", b"1")
    store.write("runs/a/x", b"22")
    assert store.read("runs/a/x") == b"22"
    assert store.read("runs/a/none") is None
    assert store.create("runs/a/claim", b"mine")
    assert not store.create("runs/a/claim", b"yours")
    assert store.exists("runs/a/claim")
    store.upload(big, "runs/b/big")
    assert store.upload_new(big, "runs/b/new")
    assert not store.upload_new(small, "runs/b/new")
    assert store.upload_new(small, "runs/b/small")
    assert store.download("runs/b/new", big.with_name("back")) == {"size": BIG, "sha256": sha256(big)}
    assert sha256(big.with_name("back")) == sha256(big)
    assert store.keys("runs") == ["runs/a/claim", "runs/a/x", "runs/b/big", "runs/b/new", "runs/b/small"]
    assert store.folders("runs") == ["a", "b"]
    store.delete(["runs/a/x", "runs/a/never"])
    assert not store.exists("runs/a/x")


@pytest.mark.parametrize(
    "plan",
    [
        Plan(),
        Plan(error=0.3),
        Plan(reset=0.3),
        Plan(lost=0.3),
        Plan(hang=0.15),
        Plan(truncate=0.4),
        Plan(short=0.4),
        Plan(delay=0.3, delay_s=0.3),
        Plan(error=0.1, reset=0.1, lost=0.1, truncate=0.1),
    ],
    ids=["none", "error", "reset", "lost", "hang", "truncate", "short", "delay", "all"],
)
def test_every_verb_gets_through(plan: Plan, proxy: FaultProxy, url: str, big: Path) -> None:
    proxy.plan = plan
    use_every_verb(Store(url, QUICK), big)
    assert bool(sum(proxy.dealt.values())) == (plan != Plan())


VERBS = {
    "read": lambda store, big: store.read("runs/a/x"),
    "exists": lambda store, big: store.exists("runs/a/x"),
    "create": lambda store, big: store.create("runs/a/y", b"1"),
    "write": lambda store, big: store.write("runs/a/y", b"1"),
    "upload": lambda store, big: store.upload(big, "runs/a/y"),
    "upload_new": lambda store, big: store.upload_new(big, "runs/a/y"),
    "download": lambda store, big: store.download("runs/a/x", big.with_name("back")),
    "keys": lambda store, big: store.keys("runs/a"),
    "folders": lambda store, big: store.folders("runs/a"),
    "delete": lambda store, big: store.delete(["runs/a/x"]),
}


@pytest.mark.parametrize("fault", ["error", "reset", "hang"])
def test_a_store_that_stays_away_ends_every_verb_in_time(fault: str, proxy: FaultProxy, url: str, big: Path) -> None:
    store = Store(url, SHORT)
    store.write("runs/a/x", b"1")
    proxy.plan = Plan(**{fault: 1.0})

    def fail(name: str) -> tuple[str, float, str]:
        started = time.monotonic()
        with pytest.raises(StoreError) as failure:
            VERBS[name](store, big)
        return name, time.monotonic() - started, str(failure.value)

    with ThreadPoolExecutor(len(VERBS)) as pool:
        failures = list(pool.map(fail, VERBS))
    for name, took_s, message in failures:
        assert f"{url}/runs/a" in message, name
        assert "tries in" in message, name
        assert "\n" not in message, name
        assert took_s < SHORT.deadline_s + 15, f"{name} took {took_s:.1f} s: {message}"
    proxy.plan = Plan()
    assert store.keys("runs") == ["runs/a/x"]  # nothing half-written is visible, and the store is usable again
    assert not big.with_name("back").exists()
    assert store.read("runs/a/x") == b"1"


def test_a_store_that_comes_back_is_used_again(proxy: FaultProxy, url: str) -> None:
    store = Store(url, QUICK)
    store.write("runs/a/x", b"1")
    proxy.away = True
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(store.read, "runs/a/x")
        while proxy.dealt["away"] < 2 and not reading.done():
            time.sleep(0.01)
        proxy.away = False
        assert reading.result(30) == b"1"


def test_who_waits_at_a_terminal_is_told_so_once(
    proxy: FaultProxy, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "SILENT_S", 0.2)
    monkeypatch.setenv("SPOTUNE_BUCKET", url)
    monkeypatch.setenv("SPOTUNE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    proxy.plan = Plan(delay=1.0, delay_s=1.0)
    result = cli_runner().invoke(main, ["queue", "-a"])
    assert result.exit_code == 0
    told = [line for line in result.stderr.splitlines() if "no answer" in line]
    assert told == [f"{url}: no answer for 0.2 s; asked again for up to 60 s"]
    said: list[str] = []
    assert Store(url, waiting=said.append).read("runs/a/none") is None
    assert said == told


def test_nothing_listens_at_all(scheme: str, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL", "STORAGE_EMULATOR_HOST"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    with pytest.raises(StoreError, match=f"{url}/runs/a/x: cannot write: .*tries in"):
        Store(url, SHORT).write("runs/a/x", b"1")


def test_a_slow_link_is_not_hung(proxy: FaultProxy, url: str, big: Path) -> None:
    """A part takes longer than a request may be silent, and is not cut."""
    store = Store(url, Patience(request_s=1.0, deadline_s=60.0, floor_bytes_per_s=2 << 20))
    proxy.plan = Plan(bandwidth_bytes_per_s=6 << 20)
    store.upload(big, "runs/a/big")
    assert store.download("runs/a/big", big.with_name("back"))["sha256"] == sha256(big)
    assert not proxy.dealt


def test_a_transfer_that_makes_progress_has_no_deadline(proxy: FaultProxy, url: str, big: Path) -> None:
    """Each request is within its limit; all together take longer than any of them may."""
    patience = Patience(request_s=15.0, deadline_s=3.0, floor_bytes_per_s=64 << 20)
    proxy.plan = Plan(delay=1.0, delay_s=1.0)
    started = time.monotonic()
    Store(url, patience).upload(big, "runs/a/big")
    assert time.monotonic() - started > patience.limit_s(RANGE_BYTES)


def test_a_record_is_not_waited_for_like_a_large_file(proxy: FaultProxy, url: str) -> None:
    store = Store(url, Patience(request_s=10.0, deadline_s=1.0, first_wait_s=0.05, longest_wait_s=0.4))
    store.write("runs/a/x", b"1")
    proxy.away = True
    started = time.monotonic()
    with pytest.raises(StoreError, match="runs/a/x: cannot read"):
        store.read("runs/a/x")
    assert time.monotonic() - started < 60 < store._bucket._line.patience.limit_s(RANGE_BYTES)  # type: ignore[attr-defined]


def test_a_flipped_bit_is_seen(proxy: FaultProxy, url: str, big: Path) -> None:
    store = Store(url, QUICK)
    store.upload(big, "runs/a/big")
    proxy.plan = Plan(flip=1.0, times=1, min_bytes=BIG // 4)
    facts = store.download("runs/a/big", big.with_name("back"))
    assert proxy.dealt["flip"] == 1
    assert facts["size"] == BIG
    assert facts["sha256"] != sha256(big)
    assert facts["sha256"] == sha256(big.with_name("back"))


def test_only_the_parts_that_failed_are_sent_again(proxy: FaultProxy, url: str, big: Path, scheme: str) -> None:
    store = Store(url, STEADY)
    store.exists("runs/a/big")
    proxy.plan = Plan(lost=1.0, times=1, match="partNumber=2" if scheme == "s3" else "upload_id")
    store.upload(big, "runs/a/big")
    assert proxy.dealt["lost"] == 1
    sent = proxy.count("PUT", "partNumber") if scheme == "s3" else proxy.count("POST", "upload_id")
    assert sent == (4 if scheme == "s3" else 3)  # what GCS has already is asked for, and not sent again


@pytest.mark.parametrize("scheme", ["s3"], indirect=True)
def test_an_upload_that_fails_leaves_no_parts_to_be_paid_for(proxy: FaultProxy, url: str, big: Path) -> None:
    store = Store(url, SHORT)
    store.write("runs/a/x", b"1")
    proxy.plan = Plan(error=1.0, match="partNumber=2")
    with pytest.raises(StoreError, match="runs/a/big: cannot upload"):
        store.upload(big, "runs/a/big")
    assert proxy.count("POST", "?uploads") == 1
    assert store.abort_uploads("runs", 0.0) == []
    assert store.keys("runs") == ["runs/a/x"]


def test_of_a_create_whose_answer_was_lost_the_winner_knows(
    proxy: FaultProxy, url: str, big: Path, scheme: str
) -> None:
    store = Store(url, QUICK)
    assert not store.exists("runs/a/none")
    write = {"method": "PUT" if scheme == "s3" else "POST", "times": 1}
    proxy.plan = Plan(lost=1.0, **write)
    assert store.create("runs/a/claim", b"mine")
    assert proxy.dealt["lost"] == 1
    assert not Store(url, QUICK).create("runs/a/claim", b"mine")
    last = {"method": "POST", "match": "uploadId=" if scheme == "s3" else "upload_id=", "times": 1}
    proxy.plan = Plan(lost=1.0, **last)
    assert store.upload_new(big, "runs/a/big")
    assert proxy.dealt["lost"] == 2
    assert not Store(url, QUICK).upload_new(big, "runs/a/big")


def test_a_second_answer_does_not_hide_who_won(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, url: str, big: Path, scheme: str
) -> None:
    """Where the end of an upload is tried again, a store may say that the key is taken: by the first try."""
    reach(scheme, request, monkeypatch)
    store = Store(url)
    api = store._bucket._api  # type: ignore[attr-defined]
    real = api.finish

    async def finish(client: object, upload: object, receipts: list[object], new: bool) -> None:
        await real(client, upload, receipts, new)
        raise FileExistsError

    monkeypatch.setattr(api, "finish", finish)
    assert store.upload_new(big, "runs/a/big")


def test_expired_credentials_are_read_again(proxy: FaultProxy, url: str) -> None:
    store = Store(url, Patience(request_s=2.0, deadline_s=3.0, first_wait_s=0.05, longest_wait_s=0.4))
    store.write("runs/a/x", b"1")
    proxy.plan = Plan(expired=1.0, times=2)
    assert store.read("runs/a/x") == b"1"
    proxy.plan = Plan(expired=1.0)
    with pytest.raises(StoreError, match=r"runs/a/y: cannot write: .*(expired|Invalid Credentials).* \(\d+ tries in"):
        store.write("runs/a/y", b"1")
    proxy.plan = Plan()
    assert store.keys("runs") == ["runs/a/x"]


def test_credentials_that_never_worked_are_bad_input(proxy: FaultProxy, url: str) -> None:
    proxy.plan = Plan(expired=1.0)
    with pytest.raises(InputError, match="SPOTUNE_BUCKET: .*access denied: .*(expired|Invalid Credentials)"):
        Store(url, STEADY).write("runs/a/x", b"1")
    assert len(proxy.seen) == 1


def test_new_credentials_in_the_file_are_used(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reach("s3", request, monkeypatch)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    file = tmp_path / "credentials"
    file.write_text("[default]\naws_access_key_id = OLD\naws_secret_access_key = x\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    with FaultProxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        store = Store(f"s3://spotune/{tmp_path.name}", STEADY)
        store.write("runs/a/x", b"1")
        proxy.plan = Plan(expired=1.0, times=1)
        file.write_text("[default]\naws_access_key_id = NEW\naws_secret_access_key = x\n")
        assert store.read("runs/a/x") == b"1"
        keys = [seen.headers["Authorization"].split("Credential=")[1].split("/")[0] for seen in proxy.seen]
        assert keys == ["OLD", "OLD", "NEW"]


@pytest.mark.parametrize("verb", ["create", "upload_new"])
@pytest.mark.parametrize("scheme", ["s3"], indirect=True)
def test_the_condition_holds_where_looking_first_does_not(verb: str, proxy: FaultProxy, url: str, big: Path) -> None:
    """Somebody else writes the key after it was looked up, and before our write arrives."""
    last = {"method": "PUT"} if verb == "create" else {"method": "POST", "match": "uploadId="}
    proxy.plan = Plan(hold=1.0, times=1, **last)
    store, other = Store(url), Store(url)
    with ThreadPoolExecutor(1) as pool:
        ours = pool.submit(VERBS[verb], store, big)
        while not proxy.dealt["hold"]:
            time.sleep(0.01)
        other.write("runs/a/y", b"theirs")
        proxy.plan = Plan()
        assert ours.result(20) is False
    assert store.read("runs/a/y") == b"theirs"


def test_create_only_writes_say_so(proxy: FaultProxy, url: str, big: Path, scheme: str) -> None:
    """The GCS emulator ignores the condition, so it is the requests that are looked at."""
    store = Store(url, STEADY)
    assert store.create("runs/a/claim", b"1")
    assert store.upload_new(big, "runs/a/big")
    writes = [seen for seen in proxy.seen if seen.method in ("PUT", "POST")]
    if scheme == "s3":
        ends = [seen for seen in writes if "partNumber" not in seen.path and "uploads" not in seen.path]
        assert [(seen.method, seen.headers.get("If-None-Match")) for seen in ends] == [("PUT", "*"), ("POST", "*")]
    else:
        first = [seen.path for seen in writes if "upload_id" not in seen.path]
        assert ["uploadType=multipart" in first[0], "uploadType=resumable" in first[1]] == [True, True]
        assert ["ifGenerationMatch=0" in path for path in first] == [True, True]


def test_a_loop_that_hangs_is_replaced(proxy: FaultProxy, url: str) -> None:
    store, released = Store(url), Event()
    store.write("runs/a/x", b"1")

    async def block(client: object) -> None:
        released.wait(60)

    line = store._bucket._line  # type: ignore[attr-defined]
    line.patience = Patience(request_s=0.5, deadline_s=1.0, floor_bytes_per_s=1 << 30)
    stuck = line.submit("read", block)
    with pytest.raises(StoreError, match=f"{url}/runs/a/x: cannot read: the client has hung for 2 s"):
        store.read("runs/a/x")
    line.patience = Patience()
    assert store.read("runs/a/x") == b"1"
    assert not stuck.future.done()
    released.set()
    with suppress(CancelledError, GaveUp):
        stuck.future.result(10)
