"""The clouds' own notices, asked from real HTTP servers on loopback that stand in for their metadata services."""

import json
import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from random import Random
from typing import Any

import pytest

from spotune.guard.leaving import Notices
from spotune.guard.notice_sources import (
    AZURE_TAG,
    SLOWEST_S,
    NoAnswer,
    NoticeSource,
    NoticeWatcher,
    Pod,
    PodDeletion,
    Preempted,
    ScheduledEvents,
    SpotAction,
    Warned,
    ask,
    cloud_of,
    is_for,
    read_action,
    read_deletion,
    read_preempts,
    seconds_until,
    sources_for,
    this_pod,
)
from tests.unit.guard.metadata_server import Headers, Reply, Service, serve
from tests.waiting import LIMIT_S, until

NOW = datetime(2026, 11, 24, 20, 40, tzinfo=UTC)
AT = NOW.timestamp()


class Aws:
    """Session tokens as IMDSv2 has them; ``reply`` is what spot/instance-action says."""

    def __init__(self) -> None:
        self.reply: Reply = (404, "Not Found")
        self.tokens: list[str] = []
        self.valid = True

    def __call__(self, method: str, path: str, headers: Headers) -> Reply:
        if (method, path) == ("PUT", "/latest/api/token"):
            assert 1 <= int(headers["x-aws-ec2-metadata-token-ttl-seconds"]) <= 21_600
            self.tokens.append(f"token-{len(self.tokens)}")
            self.valid = True
            return 200, self.tokens[-1]
        assert (method, path) == ("GET", "/latest/meta-data/spot/instance-action")
        if not self.valid or not self.tokens or headers.get("x-aws-ec2-metadata-token") != self.tokens[-1]:
            return 401, "Unauthorized"
        return self.reply

    def planned(self, action: str = "terminate", after_s: float = 118) -> None:
        time_ = (NOW + timedelta(seconds=after_s)).strftime("%Y-%m-%dT%H:%M:%SZ")
        self.reply = 200, json.dumps({"action": action, "time": time_})


@pytest.fixture
def aws() -> Iterator[tuple[Aws, Service]]:
    cloud = Aws()
    with serve(cloud) as service:
        yield cloud, service


def test_aws_warns_with_the_time_that_is_left(aws: tuple[Aws, Service]) -> None:
    cloud, service = aws
    source = SpotAction(service.url + "/")
    assert source.probe(AT) is None
    assert source.probe(AT) is None
    cloud.planned()
    assert source.probe(AT) == Warned(118)
    assert source.probe(AT + 200) == Warned(0)
    cloud.planned("hibernate", after_s=0)
    assert source.probe(AT) == Warned(0)
    assert len(cloud.tokens) == 1


def test_an_aws_token_that_expired_is_renewed(aws: tuple[Aws, Service]) -> None:
    cloud, service = aws
    now = [0.0]
    source = SpotAction(service.url, clock=lambda: now[0])
    assert source.probe(AT) is None
    cloud.valid = False  # refused before its time
    assert source.probe(AT) is None
    now[0] += 6 * 3600  # its time is over: not even tried
    asked = len(service.asked)
    assert source.probe(AT) is None
    assert [method for method, _, _ in service.asked[asked:]] == ["PUT", "GET"]
    assert cloud.tokens == ["token-0", "token-1", "token-2"]


@pytest.mark.parametrize(
    ("reply", "line"),
    [
        ((200, '{"action": "termin'), "not JSON"),
        ((200, "<html>"), "not JSON"),
        ((200, "[" * 100_000), "not JSON"),
        ((200, '["terminate"]'), "no JSON object"),
        ((200, '{"action": "rebalance"}'), "no action that is known"),
        ((200, '{"action": ["stop"]}'), "no action that is known"),
        ((200, "{}"), "no action that is known"),
        ((500, ""), "status 500"),
        ((403, ""), "status 403"),
        ((401, ""), "status 401"),
    ],
)
def test_what_aws_cannot_mean_is_no_notice(aws: tuple[Aws, Service], reply: Reply, line: str) -> None:
    cloud, service = aws
    cloud.reply = reply
    source = SpotAction(service.url)
    with pytest.raises(NoAnswer, match=line):
        source.probe(AT)
    cloud.planned()
    assert source.probe(AT) == Warned(118)


@pytest.mark.parametrize(
    ("body", "seconds"),
    [
        ('{"action": "terminate"}', 120),
        ('{"action": "stop", "time": "soon"}', 120),
        ('{"action": "stop", "time": 17}', 120),
        ('{"action": "hibernate"}', 0),
        ('{"action": "stop", "time": "2026-11-24T20:41:30Z"}', 90),
    ],
)
def test_an_aws_action_without_a_time_has_its_usual_one(body: str, seconds: float) -> None:
    assert read_action(body, AT) == Warned(seconds)


def test_without_an_aws_token_nothing_is_asked() -> None:
    with serve(lambda method, *_: (403, "") if method == "PUT" else (404, "")) as service:
        with pytest.raises(NoAnswer, match="no session token: status 403"):
            SpotAction(service.url).probe(AT)
        assert [method for method, _, _ in service.asked] == ["PUT"]


def test_gcp_warns_without_a_time() -> None:
    said: list[Reply] = [(200, "FALSE\n"), (200, "maybe"), (503, ""), (200, "TRUE")]

    def answer(method: str, path: str, headers: Headers) -> Reply:
        assert (method, path) == ("GET", "/computeMetadata/v1/instance/preempted")
        assert headers["metadata-flavor"] == "Google"
        return said.pop(0)

    with serve(answer) as service:
        source = Preempted(f"127.0.0.1:{service.port}")
        assert source.probe(AT) is None
        with pytest.raises(NoAnswer, match="neither TRUE nor FALSE: 'maybe'"):
            source.probe(AT)
        with pytest.raises(NoAnswer, match="status 503"):
            source.probe(AT)
        assert source.probe(AT) == Warned(None)


class Azure:
    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.name: Reply = (200, "train-0")
        self.names_asked = 0

    def __call__(self, method: str, path: str, headers: Headers) -> Reply:
        assert method == "GET", "an event was acknowledged"
        if headers.get("metadata") != "true":
            return 400, ""
        if path == "/metadata/scheduledevents?api-version=2020-07-01":
            return 200, json.dumps({"DocumentIncarnation": 1, "Events": self.events})
        assert path.startswith("/metadata/instance/compute/name?")
        self.names_asked += 1
        return self.name


def event(resources: Any, after_s: float | None = 30, kind: str = "Preempt") -> dict[str, Any]:
    time_ = "" if after_s is None else format_datetime(NOW + timedelta(seconds=after_s), usegmt=True)
    return {"EventType": kind, "Resources": resources, "NotBefore": time_, "EventStatus": "Scheduled"}


@pytest.mark.parametrize(
    ("events", "warned"),
    [
        ([], None),
        ([event(["train-0"])], Warned(30)),
        ([event(["TRAIN-0", "train-1"], 45)], Warned(45)),
        ([event(["train-1"])], None),
        ([event(["train-0"], 900, "Freeze"), event(["train-0"], 300, "Terminate")], None),
        ([event(["train-1"], 10), event(["train-0"], 40)], Warned(40)),
        ([event(["train-0"], 50), event(["train-0"], 40)], Warned(40)),
        ([event(["train-0"], None)], Warned(None)),  # it has started
        ([event([])], Warned(30)),
        ([event(None)], Warned(30)),
    ],
)
def test_azure_warns_the_machine_that_is_meant(events: list[dict[str, Any]], warned: Warned | None) -> None:
    cloud = Azure()
    with serve(cloud) as service:
        source = ScheduledEvents(service.url)
        assert source.probe(AT) is None
        assert cloud.names_asked == 0
        cloud.events = events
        assert source.probe(AT) == warned
        assert source.probe(AT) == warned
        assert cloud.names_asked <= 1


def test_an_azure_machine_without_a_name_takes_every_preemption_for_its_own() -> None:
    cloud = Azure()
    cloud.events, cloud.name = [event(["train-1"])], (500, "")
    with serve(cloud) as service:
        source = ScheduledEvents(service.url)
        assert source.probe(AT) == Warned(30)
        cloud.name = 200, "train-0"
        assert source.probe(AT) is None


@pytest.fixture
def account(tmp_path: Path) -> Path:
    """A service account with a certificate for 127.0.0.1; ``key.pem`` is the server's."""
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    today = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(1).not_valid_before(today - timedelta(days=1)).not_valid_after(today + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    (tmp_path / "ca.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    pem = serialization.PrivateFormat.PKCS8
    (tmp_path / "key.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, pem, serialization.NoEncryption()))
    (tmp_path / "namespace").write_text("ml\n")
    (tmp_path / "token").write_text("first\n")
    return tmp_path


def test_kubernetes_warns_when_the_pod_is_deleted(account: Path) -> None:
    pod: dict[str, Any] = {"kind": "PartialObjectMetadata", "metadata": {"name": "train-head"}}
    tokens: list[str] = []

    def answer(method: str, path: str, headers: Headers) -> Reply:
        assert (method, path) == ("GET", "/api/v1/namespaces/ml/pods/train-head")
        tokens.append(headers["authorization"])
        return (200, json.dumps(pod)) if tokens[-1] == "Bearer first" else (403, "")

    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(account / "ca.crt", account / "key.pem")
    with serve(answer, tls) as service:
        environ = {
            "KUBERNETES_SERVICE_HOST": "127.0.0.1",
            "KUBERNETES_SERVICE_PORT": str(service.port),
            "SKYPILOT_POD_NAME": "train-head",
        }
        found = this_pod(environ, account)
        assert found
        source = PodDeletion(found)
        assert source.probe(AT) is None
        pod["metadata"]["deletionTimestamp"] = "2026-11-24T20:40:30Z"
        assert source.probe(AT) == Warned(30)
        (account / "token").write_text("second")
        with pytest.raises(NoAnswer, match="status 403"):
            source.probe(AT)
        assert tokens == ["Bearer first", "Bearer first", "Bearer second"]
        (account / "ca.crt").write_text("no certificate")
        with pytest.raises(NoAnswer, match="the service account cannot be used"):
            source.probe(AT)


def test_a_server_with_another_certificate_is_not_asked(account: Path) -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(account / "ca.crt", account / "key.pem")
    with serve(lambda *_: (200, "{}"), tls) as service:
        url = f"https://127.0.0.1:{service.port}/"
        with pytest.raises(NoAnswer, match="CERTIFICATE_VERIFY_FAILED"):
            ask(url, {}, tls=ssl.create_default_context())
        assert service.asked == []


def test_a_pod_that_may_not_ask_has_no_source(account: Path) -> None:
    environ = {"KUBERNETES_SERVICE_HOST": "fd00::1", "HOSTNAME": "train-head"}
    assert this_pod(environ, account) == Pod("https://[fd00::1]:443", "ml", "train-head", account)
    assert this_pod({**environ, "KUBERNETES_SERVICE_HOST": ""}, account) is None
    (account / "token").unlink()
    assert this_pod(environ, account) is None
    assert this_pod(environ, account / "none") is None


KEYS = ("action", "time", "Events", "EventType", "Resources", "NotBefore", "metadata", "deletionTimestamp")
LEAVES = (None, True, -1, 1e308, "", "stop", "Preempt", "2026-11-24T20:42:00Z", "9999-12-31T23:59:59-14:00", "\x00")


def anything(random: Random, depth: int = 4) -> Any:
    """Some JSON, of the words that the services use."""
    match random.randrange(3) if depth else 0:
        case 0:
            return random.choice(LEAVES)
        case 1:
            return [anything(random, depth - 1) for _ in range(random.randrange(3))]
        case _:
            return {random.choice(KEYS): anything(random, depth - 1) for _ in range(random.randrange(4))}


def test_no_answer_whatsoever_ends_the_watch() -> None:
    random = Random(0)
    understood = 0
    for _ in range(4_000):
        body = json.dumps(anything(random))
        for read in (
            lambda body: read_action(body, AT),
            lambda body: read_deletion(body, AT),
            lambda body: [
                (is_for(event, "train-0"), seconds_until(event.get("NotBefore"), AT)) for event in read_preempts(body)
            ],
        ):
            try:
                understood += bool(read(body))
            except NoAnswer:
                continue
    assert understood > 10


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2026-11-24T20:42:00Z", 120),
        ("2026-11-24T21:42:00+01:00", 120),
        ("2026-11-24T20:42:00", 120),
        ("Tue, 24 Nov 2026 20:40:30 GMT", 30),
        ("Tue, 24 Nov 2026 20:40:30 -0000", 30),
        ("2026-11-24T20:39:00Z", 0),
        ("", None),
        ("in two minutes", None),
        ("9999-99-99T00:00:00Z", None),
        ("0001-01-01T00:00:00+14:00", 0),
        (None, None),
        (1790000000, None),
    ],
)
def test_times_as_clouds_write_them(text: Any, seconds: float | None) -> None:
    assert seconds_until(text, AT) == seconds


def test_a_request_knows_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(lambda *_: (200, "direct")) as service, serve(lambda *_: (200, "proxy")) as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "https_proxy"):
            monkeypatch.setenv(name, proxy.url)
        assert ask(service.url + "/x", {})[1] == "direct"
        assert proxy.asked == []


def test_a_request_follows_no_redirect_and_names_what_is_wrong() -> None:
    with serve(lambda *_: (302, "elsewhere")) as service:
        assert ask(service.url + "/x", {})[0] == 302
    with pytest.raises(NoAnswer, match="127.0.0.1:[0-9]+ does not answer: .*refused"):
        ask(service.url + "/x", {})
    with pytest.raises(NoAnswer, match="is no address"):
        ask("http://127.0.0.1:port/x", {})


def test_a_request_does_not_wait_for_a_server_that_hangs() -> None:
    deaf = socket.create_server(("127.0.0.1", 0))  # accepts, and never says a word
    with deaf, pytest.raises(NoAnswer, match="timed out"):
        ask(f"http://127.0.0.1:{deaf.getsockname()[1]}/", {}, timeout_s=0.1)


@contextmanager
def watched(*sources: NoticeSource) -> Iterator[Notices]:
    for source in sources:
        source.every_s = 0.02
    notices = Notices(clock=lambda: AT)
    with NoticeWatcher(sources, notices, clock=lambda: AT):
        yield notices
    until(lambda: not watchers())


def watchers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "notices"]


def test_the_watcher_passes_a_notice_on_and_asks_no_more(aws: tuple[Aws, Service]) -> None:
    cloud, service = aws
    with watched(SpotAction(service.url)) as notices:
        until(lambda: len(service.asked) > 4)
        assert not notices.given
        cloud.planned()
        assert notices.wait(LIMIT_S)
        assert notices.notice
        assert (notices.source, notices.notice.grace_s) == ("aws spot/instance-action", 118)
        until(lambda: not watchers())


def test_a_service_that_goes_away_and_comes_back(aws: tuple[Aws, Service], capsys: pytest.CaptureFixture[str]) -> None:
    cloud, service = aws
    failures = 0

    class Counted(SpotAction):
        def probe(self, now: float) -> Warned | None:
            nonlocal failures
            try:
                return super().probe(now)
            except NoAnswer:
                failures += 1
                raise

    with watched(Counted(service.url)) as notices:
        until(lambda: len(service.asked) > 2)
        for _ in range(2):
            service.down()
            before = failures
            until(lambda before=before: failures > before)  # type: ignore[misc]
            service.up()
            asked = len(service.asked)
            until(lambda asked=asked: len(service.asked) > asked)  # type: ignore[misc]
        assert not notices.given
        cloud.planned()
        assert notices.wait(LIMIT_S)
    said = [line for line in capsys.readouterr().err.splitlines() if "asked again" in line]
    assert len(said) == 1
    assert said[0].startswith("[spotune] aws spot/instance-action: 127.0.0.1:")
    assert said[0].endswith("asked again until it answers")


def test_a_service_that_hangs_holds_nothing_up() -> None:
    waits = threading.Event()

    class Hanging(Preempted):
        def probe(self, now: float) -> Warned | None:
            found = super().probe(now)
            waits.wait()  # however long the request takes
            return found

    with serve(lambda *_: (200, "TRUE")) as service:
        notices = Notices(clock=lambda: AT)
        with NoticeWatcher([Hanging(f"127.0.0.1:{service.port}")], notices, clock=lambda: AT):
            until(lambda: service.asked)
        assert watchers()  # the guard goes on, the request does too
        assert not notices.given
        waits.set()
        until(lambda: not watchers())


def test_one_watcher_asks_all_its_sources(aws: tuple[Aws, Service]) -> None:
    cloud, service = aws
    with serve(lambda *_: (200, "TRUE")) as other:
        with watched(SpotAction(service.url), Preempted(f"127.0.0.1:{other.port}")) as notices:
            assert notices.wait(LIMIT_S)
            assert notices.source == "gcp instance/preempted"
            asked = len(service.asked)
            until(lambda: len(service.asked) > asked)  # the other goes on
            assert len(watchers()) == 1
            cloud.planned(after_s=7)
            until(lambda: notices.notice and notices.notice.grace_s == 7)
        assert notices.source == "gcp instance/preempted"


def test_a_source_that_fails_is_asked_ever_more_slowly() -> None:
    class Broken:
        name, every_s = "broken", 1.0
        answer: Warned | NoAnswer | None = NoAnswer("no")

        def probe(self, now: float) -> Warned | None:
            if isinstance(self.answer, NoAnswer):
                raise self.answer
            return self.answer

    source = Broken()
    watcher = NoticeWatcher([source], Notices())
    assert [watcher.ask(source) for _ in range(6)] == [2, 4, 8, SLOWEST_S, SLOWEST_S, SLOWEST_S]
    assert all(watcher.ask(source) == SLOWEST_S for _ in range(2000))
    source.answer = None
    assert watcher.ask(source) == 1
    source.answer = NoAnswer("again")
    assert watcher.ask(source) == 2


def firmware(folder: Path, **files: str) -> Path:
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text + "\n")
    return folder


@pytest.mark.parametrize(
    ("cloud", "files"),
    [
        ("aws", {"sys_vendor": "Amazon EC2", "product_name": "g5.xlarge", "bios_version": "1.0"}),
        ("aws", {"sys_vendor": "Xen", "product_name": "HVM domU", "bios_version": "4.11.amazon"}),
        ("gcp", {"sys_vendor": "Google", "product_name": "Google Compute Engine"}),
        (
            "azure",
            {
                "sys_vendor": "Microsoft Corporation",
                "product_name": "Virtual Machine",
                "chassis_asset_tag": AZURE_TAG,
            },
        ),
        ("", {"sys_vendor": "Microsoft Corporation", "product_name": "Virtual Machine", "chassis_asset_tag": "0"}),
        ("", {"sys_vendor": "Google", "product_name": "Eve"}),
        ("", {"sys_vendor": "Xen", "bios_version": "4.11"}),
        ("", {"sys_vendor": "LENOVO", "product_name": "20XW"}),
        ("", {}),
    ],
)
def test_the_firmware_says_whose_machine_it_is(cloud: str, files: dict[str, str], tmp_path: Path) -> None:
    assert cloud_of(firmware(tmp_path / "dmi", **files)) == cloud


def test_no_firmware_says_nothing(tmp_path: Path) -> None:
    assert cloud_of(tmp_path / "none") == ""


@pytest.mark.parametrize(
    ("infra", "firm", "environ", "names"),
    [
        ("aws", "", {}, ["aws spot/instance-action"]),
        ("aws", "gcp", {}, ["aws spot/instance-action"]),
        ("aws", "", {"AWS_EC2_METADATA_DISABLED": "True"}, []),
        ("gcp", "", {}, ["gcp instance/preempted"]),
        ("azure", "", {}, ["azure scheduled event Preempt"]),
        ("", "", {}, []),
        ("", "gcp", {}, ["gcp instance/preempted"]),
        ("slurm", "", {}, []),
        ("slurm", "aws", {}, ["aws spot/instance-action"]),
        ("kubernetes", "", {}, []),
        ("kubernetes", "gcp", {}, ["gcp instance/preempted"]),
        ("local", "aws", {}, []),  # its machines are processes; the real one is not its to give up
        ("lambda", "aws", {}, []),
    ],
)
def test_what_is_watched_where(
    infra: str, firm: str, environ: dict[str, str], names: list[str], tmp_path: Path
) -> None:
    signs = {"aws": {"sys_vendor": "Amazon EC2"}, "gcp": {"product_name": "Google Compute Engine"}, "": {}}
    dmi = firmware(tmp_path / "dmi", **signs[firm])
    assert [source.name for source in sources_for(infra, environ, dmi)] == names


def test_the_environment_says_where_to_ask(tmp_path: Path) -> None:
    with serve(Aws()) as aws_, serve(Azure()) as azure, serve(lambda *_: (200, "FALSE")) as gcp:
        environ = {
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": aws_.url,
            "GCE_METADATA_HOST": f"127.0.0.1:{gcp.port}",
            "SPOTUNE_AZURE_METADATA_ENDPOINT": azure.url,
        }
        for infra, service in (("aws", aws_), ("gcp", gcp), ("azure", azure)):
            (source,) = sources_for(infra, environ, tmp_path)
            assert source.probe(AT) is None
            assert service.asked


GUARD = """
import json, sys, threading
reached = threading.Event()
def audit(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        reached.set()
sys.addaudithook(audit)
from spotune.guard import main
def work(*_):
    if any(thread.name == "notices" for thread in threading.enumerate()):  # else nobody will ever ask
        reached.wait(float(sys.argv[1]))
    return 0
main.work = work
places = json.loads(sys.argv[2])
for place in places:
    main.os.environ.update(place)
    assert main.main(["run.yaml"]) == 0
print(json.dumps({"reached": reached.is_set()}))
"""


def guard(*places: dict[str, str]) -> dict[str, Any]:
    """Whether the guard's process reaches anything by the network, place by place."""
    command = [sys.executable, "-c", GUARD, str(LIMIT_S), json.dumps(places)]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.skipif(cloud_of() != "", reason="this machine is a cloud's")
def test_where_there_is_no_such_cloud_no_packet_is_sent() -> None:
    clouds = ("Slurm", "Kubernetes", "local", "RunPod")
    found = guard({}, *({"SKYPILOT_CLUSTER_INFO": json.dumps({"cloud": cloud})} for cloud in clouds))
    assert not found["reached"]


def test_where_there_is_one_it_is_asked(aws: tuple[Aws, Service]) -> None:
    _, service = aws
    place = {"SKYPILOT_CLUSTER_INFO": '{"cloud": "AWS"}', "AWS_EC2_METADATA_SERVICE_ENDPOINT": service.url}
    found = guard(place)
    assert found["reached"]
