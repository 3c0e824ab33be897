"""The bucket's verbs on S3 and on GCS, through a proxy that fails: what each store's own requests and clients do then.

How long a verb holds out, and what it sends again, is the same for both: tests/unit/core/test_store_retries.py.
"""

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from spotune.cli import main
from spotune.core.errors import InputError, StoreError
from spotune.core.store import FOR_VERBS, Patience, Store, clouds, objects
from spotune.core.store.objects import Objects
from tests.clocks import ClockLoop, Loops
from tests.commands import cli_runner
from tests.conftest import reach
from tests.faultproxy import FaultProxy, Plan
from tests.store_verbs import VERBS, sha256, use_every_verb
from tests.unit.project import Project
from tests.waiting import LIMIT_S, until

STEADY = Patience(
    request_s=300.0, deadline_s=300.0, first_wait_s=0.02, longest_wait_s=0.1
)  # nothing is cut for being slow
BRIEF = Patience(300.0, deadline_s=0.3, floor_bytes_per_s=1 << 30, first_wait_s=0.02)  # of real time, with two tries
FROZEN = Patience(request_s=15.0, deadline_s=600.0, first_wait_s=0.01, longest_wait_s=0.01)  # by a clock of the test's
PATIENT = Patience(request_s=15.0, floor_bytes_per_s=1.0, first_wait_s=0.01, longest_wait_s=0.01)  # but for silence
PART_BYTES = 256 << 10  # GCS takes no smaller ones
BIG = 3 * PART_BYTES - 7  # two ranges, and three parts


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of less than a megabyte have several ranges and parts."""
    monkeypatch.setattr(clouds, "PART_BYTES", PART_BYTES)
    monkeypatch.setattr(clouds, "PART_BYTES", PART_BYTES)
    monkeypatch.setattr(objects, "RANGE_BYTES", 2 * PART_BYTES)


@pytest.fixture(params=["s3", "gs"])
def scheme(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def proxy(scheme: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy in front of the store of ``scheme``, with the environment that leads to it."""
    reach(scheme, request, monkeypatch)
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


def frozen(url: str, patience: Patience = FROZEN) -> tuple[Store, Loops]:
    """A store whose clock stands still until the test moves it."""
    store, loops = Store(url, patience), Loops(ClockLoop)
    bucket = store._bucket
    assert isinstance(bucket, Objects)
    store._bucket = Objects(bucket._api, bucket._root, patience, None, loops)
    return store, loops


@pytest.mark.parametrize(
    "plan",
    [Plan(), Plan(error=0.15, reset=0.1, lost=0.15, truncate=0.15, short=0.15, delay=0.05, delay_s=0.02)],
    ids=["none", "all"],
)
def test_every_verb_gets_through(plan: Plan, proxy: FaultProxy, url: str, big: Path) -> None:
    proxy.plan = plan
    use_every_verb(Store(url, STEADY), big)
    dealt = {name for name, count in proxy.dealt.items() if count}
    assert dealt == {name for name in ("error", "reset", "lost", "truncate", "short", "delay") if getattr(plan, name)}


@pytest.mark.parametrize("fault", ["error", "reset", "truncate", "short"])
def test_a_download_in_ranges_gets_through_each_fault(fault: str, proxy: FaultProxy, url: str, big: Path) -> None:
    store = Store(url, STEADY)
    store.upload(big, "runs/a/big")
    for range_ in range(2):
        proxy.plan = Plan(**{fault: 1.0}, times=1, skip=range_, method="GET", match="big")
        assert store.download("runs/a/big", big.with_name("back"))["sha256"] == sha256(big)
    assert proxy.dealt[fault] == 2


@pytest.mark.parametrize(
    ("verb", "wanted"),
    [
        ("read", {"method": "GET"}),
        ("exists", {}),
        ("write", {}),
        ("upload", {"skip": 1}),
        ("download", {"method": "GET", "skip": 1}),
        ("keys", {"method": "GET"}),
        ("delete", {"method": "DELETE"}),
    ],
)
def test_a_request_without_an_answer_is_tried_again(
    verb: str, wanted: dict[str, object], proxy: FaultProxy, url: str, big: Path
) -> None:
    store, loops = frozen(url)
    if verb == "download":
        store.upload(big, "runs/a/x")
    else:
        store.write("runs/a/x", b"1")
    proxy.plan = Plan(hang=1.0, times=1, **wanted)  # type: ignore[arg-type]
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(VERBS[verb], store, big)
        proxy.until("hang")
        assert not asked.done()
        loops.advance(FROZEN.try_s(12 << 20))
        until(lambda: loops.advance(0.01) or asked.done(), proxy.seen)
        asked.result()
    assert proxy.dealt == {"hang": 1}


def test_a_body_that_falls_silent_is_asked_for_again(proxy: FaultProxy, url: str, big: Path) -> None:
    store, loops = frozen(url, PATIENT)
    store.upload(big, "runs/a/big")
    proxy.plan = Plan(stall=1.0, times=1, method="GET", match="big")
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(store.download, "runs/a/big", big.with_name("back"))
        proxy.until("pause")
        loops.advance(PATIENT.request_s + 0.1)
        until(lambda: loops.advance(0.01) or asked.done(), proxy.seen)
        assert asked.result()["sha256"] == sha256(big)
    assert proxy.dealt == {"stall": 1, "pause": 1}


def test_a_body_that_comes_slowly_is_not_cut(proxy: FaultProxy, url: str, big: Path) -> None:
    """It pauses, never for as long as a request may be silent, and all in all for longer."""
    store, loops = frozen(url, PATIENT)
    store.upload(big, "runs/a/big")
    count = len(proxy.seen)
    proxy.plan = Plan(stall=1.0, times=1, method="GET", match="big")
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(store.download, "runs/a/big", big.with_name("back"))
        for pause in (1, 2, 3):
            proxy.until("pause", pause)
            for _ in range(20):
                loops.advance(0.0)  # it reads what has come
            loops.advance(PATIENT.request_s - 1.0)
            proxy.plan = Plan(stall=1.0, times=0)
        until(lambda: loops.advance(0.01) or asked.done(), proxy.seen)
        assert asked.result()["sha256"] == sha256(big)
    assert len(proxy.seen) == count + 2  # the two ranges


def test_a_slow_link_is_not_hung(proxy: FaultProxy, url: str, big: Path, scheme: str) -> None:
    """A part takes longer than a request may be silent, and is not cut."""
    store, loops = frozen(url)
    store.exists("runs/a/any")
    proxy.plan = Plan(hold=1.0, times=1, match="partNumber=1" if scheme == "s3" else "upload_id")
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(store.upload, big, "runs/a/big")
        proxy.until("hold")
        if scheme == "s3":  # its parts go side by side, and one that still connects may not take so long
            until(lambda: sum("partNumber" in seen.path for seen in proxy.seen) == 3, proxy.seen)
        loops.advance(FROZEN.request_s + 0.1)
        proxy.plan = Plan()
        until(lambda: loops.advance(0.01) or asked.done(), proxy.seen)
        asked.result()
    sent = {(seen.method, seen.path, seen.headers.get("Content-Range")) for seen in proxy.seen}
    assert len(sent) == len(proxy.seen)  # nothing twice


@pytest.mark.parametrize("fault", ["error", "reset", "hang"])
def test_a_store_that_stays_away_ends_every_verb(fault: str, proxy: FaultProxy, url: str, big: Path) -> None:
    store = Store(url, STEADY)
    store.write("runs/a/x", b"1")
    proxy.plan = Plan(**{fault: 1.0})
    brief = Store(url, BRIEF)

    def failure(name: str) -> str:
        with pytest.raises(StoreError) as error:
            VERBS[name](brief, big)
        return str(error.value)

    with ThreadPoolExecutor(len(VERBS)) as pool:
        failures = dict(zip(VERBS, pool.map(failure, VERBS), strict=True))
    for name, message in failures.items():
        assert f"{url}/runs/a" in message, name
        assert "tries in" in message, name
        assert "\n" not in message, name
    proxy.plan = Plan()
    assert store.keys("runs") == ["runs/a/x"]  # nothing half-written is visible, and the store is usable again
    assert brief.keys("runs") == ["runs/a/x"]
    assert not big.with_name("back").exists()
    assert store.read("runs/a/x") == b"1"


@pytest.mark.parametrize("scheme", ["s3"], indirect=True)
def test_a_store_that_comes_back_is_used_again(proxy: FaultProxy, url: str) -> None:
    store = Store(url, STEADY)
    store.write("runs/a/x", b"1")
    proxy.away = True
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(store.read, "runs/a/x")
        proxy.until("away", 2)
        proxy.away = False
        assert reading.result(LIMIT_S) == b"1"


@pytest.mark.parametrize("scheme", ["s3"], indirect=True)
def test_who_waits_at_a_terminal_is_told_so_once(
    proxy: FaultProxy, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "SILENT_S", 0.05)
    monkeypatch.setenv("SPOTUNE_BUCKET", url)
    project = Project(tmp_path / "project", monkeypatch)
    project.submit("run-a", "--infra", "local")
    real = objects.Connection._tell

    def tell(self: objects.Connection) -> None:
        real(self)
        proxy.plan = Plan()  # the store answers now

    monkeypatch.setattr(objects.Connection, "_tell", tell)
    proxy.plan = Plan(hold=1.0)
    result = cli_runner().invoke(main, ["queue", "-a"])
    assert result.exit_code == 0
    told = [line for line in result.stderr.splitlines() if "no answer" in line]
    assert told == [f"{url}: no answer for 0.05 s; asked again for up to 15 s"]
    after = result.stderr.partition(told[0])[2].splitlines()
    assert after[1] == "So far, as the queues say:"
    assert after[3].split()[:2] == ["run-a", "PENDING"]  # below the header
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["RUN", "run-a"]
    proxy.plan = Plan(hold=1.0)
    said: list[str] = []
    assert Store(url, FOR_VERBS, waiting=said.append).read("runs/a/none") is None
    assert said == told


def test_nothing_listens_at_all(scheme: str, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL", "STORAGE_EMULATOR_HOST"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    with pytest.raises(StoreError, match=f"{url}/runs/a/x: cannot write: .*tries in"):
        Store(url, BRIEF).write("runs/a/x", b"1")


def test_a_flipped_bit_is_seen(proxy: FaultProxy, url: str, big: Path) -> None:
    store = Store(url, STEADY)
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
    store = Store(url, STEADY)
    store.write("runs/a/x", b"1")
    proxy.plan = Plan(error=1.0, match="partNumber=2")
    with pytest.raises(StoreError, match="runs/a/big: cannot upload"):
        Store(url, BRIEF).upload(big, "runs/a/big")
    assert proxy.count("POST", "?uploads") == 1
    assert store.abort_uploads("runs", 0.0) == []
    assert store.keys("runs") == ["runs/a/x"]


def test_of_a_create_whose_answer_was_lost_the_winner_knows(
    proxy: FaultProxy, url: str, big: Path, scheme: str
) -> None:
    store = Store(url, STEADY)
    assert not store.exists("runs/a/none")
    proxy.plan = Plan(lost=1.0, method="PUT" if scheme == "s3" else "POST", times=1)
    assert store.create("runs/a/claim", b"mine")
    assert proxy.dealt["lost"] == 1
    assert not Store(url, STEADY).create("runs/a/claim", b"mine")
    proxy.plan = Plan(lost=1.0, method="POST", match="uploadId=" if scheme == "s3" else "upload_id=", times=1)
    assert store.upload_new(big, "runs/a/big")
    assert proxy.dealt["lost"] == 2
    assert not Store(url, STEADY).upload_new(big, "runs/a/big")


def test_expired_credentials_are_read_again(proxy: FaultProxy, url: str) -> None:
    store = Store(url, STEADY)
    store.write("runs/a/x", b"1")
    proxy.plan = Plan(expired=1.0, times=2)
    assert store.read("runs/a/x") == b"1"
    assert proxy.dealt == {"expired": 2}
    proxy.plan = Plan(expired=1.0)
    store._bucket._line.patience = BRIEF  # type: ignore[attr-defined]
    with pytest.raises(StoreError, match=r"runs/a/y: cannot write: .*(expired|Invalid Credentials).* \(\d+ tries in"):
        store.write("runs/a/y", b"1")
    store._bucket._line.patience = STEADY  # type: ignore[attr-defined]
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
    store, other = Store(url, STEADY), Store(url, STEADY)
    with ThreadPoolExecutor(1) as pool:
        ours = pool.submit(VERBS[verb], store, big)
        proxy.until("hold")
        other.write("runs/a/y", b"theirs")
        proxy.plan = Plan()
        assert ours.result(LIMIT_S) is False
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
