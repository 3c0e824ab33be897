"""Asks clouds for preemption notices: a source per cloud, one watcher for all of them."""

import json
import ssl
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from spotune.core import environment
from spotune.guard.journal import Clock, log
from spotune.guard.leaving import Notices

ENDPOINT = "http://169.254.169.254"
TOKEN_TTL_S = 21_600  # the longest possible
ACTIONS = {"terminate": 120.0, "stop": 120.0, "hibernate": 0.0}
HOST = "metadata.google.internal"
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
DMI = Path("/sys/class/dmi/id")
AZURE_TAG = "7783-7084-3265-9085-8269-3286-77"  # tells Azure from other Hyper-V hosts
SLOWEST_S = 15.0  # a service that comes back may have a notice of 30 s by then


class NoAnswer(Exception):
    """The service did not answer, or not as it should; ``str`` says how."""


@dataclass(frozen=True)
class Warned:
    """The machine goes in ``grace_s`` seconds; None: the service does not say when."""

    grace_s: float | None


def read_object(body: str) -> dict[str, Any]:
    """Returns the JSON object in an answer; raises NoAnswer for anything else."""
    try:
        found = json.loads(body.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise NoAnswer(f"not JSON: {body[:80]!r}") from error
    if not isinstance(found, dict):
        raise NoAnswer(f"no JSON object: {body[:80]!r}")
    return found


def seconds_until(text: Any, now: float) -> float | None:
    """Returns the seconds from ``now`` to a time in ISO 8601 or as in an HTTP header; None for anything else."""
    for read in (datetime.fromisoformat, parsedate_to_datetime) if isinstance(text, str) else ():
        with suppress(ValueError):
            time = read(text)
            return max((time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp() - now, 0.0)
    return None


def ask(
    url: str, headers: Mapping[str, str], method: str = "GET", timeout_s: float = 2.0, tls: ssl.SSLContext | None = None
) -> tuple[int, str]:
    """Returns the answer's status and body; raises NoAnswer if there is none. Uses no proxy, which might fail."""
    parts = urlsplit(url)
    try:
        connection = HTTPConnection(parts.hostname or "", parts.port, timeout=timeout_s)
        if parts.scheme == "https":
            connection = HTTPSConnection(parts.hostname or "", parts.port, timeout=timeout_s, context=tls)
    except ValueError as error:  # a port that is not a number
        raise NoAnswer(f"{url} is no address: {error}") from error
    try:
        connection.request(method, f"{parts.path}?{parts.query}" if parts.query else parts.path, headers=dict(headers))
        response = connection.getresponse()
        return response.status, response.read(1 << 20).decode()
    except (OSError, HTTPException, ValueError) as error:
        raise NoAnswer(f"{parts.netloc} does not answer: {str(error) or type(error).__name__}") from error
    finally:
        connection.close()


def ask_body(url: str, headers: Mapping[str, str], tls: ssl.SSLContext | None = None) -> str:
    """As ``ask``; returns the body, and raises NoAnswer for any status but 200."""
    status, body = ask(url, headers, tls=tls)
    if status != 200:
        raise NoAnswer(f"status {status}")
    return body


class SpotAction:
    """AWS: ``spot/instance-action`` of the instance metadata service, version 2, with a session token.

    404 while nothing is planned; then ``{"action": "terminate", "time": "2026-11-24T20:40:00Z"}``, two minutes ahead
    (``hibernate``: not ahead at all). Does not ask for rebalance recommendations: they say that an interruption has
    become likelier, and a machine is not given up for that.
    """

    name = "aws spot/instance-action"
    every_s = 5.0  # what AWS recommends

    def __init__(self, endpoint: str = ENDPOINT, clock: Clock = time.monotonic) -> None:
        self._endpoint, self._clock = endpoint.rstrip("/"), clock
        self._token, self._token_until = "", 0.0

    def probe(self, now: float) -> Warned | None:
        status, body = self._ask()
        if status == 401:
            self._token = ""
            status, body = self._ask()
        if status == 404:
            return None
        if status != 200:
            raise NoAnswer(f"status {status}")
        return read_action(body, now)

    def _ask(self) -> tuple[int, str]:
        if not self._token or self._clock() >= self._token_until:
            ttl = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_TTL_S)}
            status, body = ask(f"{self._endpoint}/latest/api/token", ttl, method="PUT")
            if status != 200 or not body.isprintable():
                raise NoAnswer(f"no session token: status {status}")
            self._token, self._token_until = body.strip(), self._clock() + TOKEN_TTL_S * 0.9
        url = f"{self._endpoint}/latest/meta-data/spot/instance-action"
        return ask(url, {"X-aws-ec2-metadata-token": self._token})


def read_action(body: str, now: float) -> Warned:
    """Returns the planned action; raises NoAnswer for anything else."""
    action = read_object(body)
    kind = action.get("action")
    if not isinstance(kind, str) or kind not in ACTIONS:
        raise NoAnswer(f"no action that is known: {body[:80]!r}")
    left_s = seconds_until(action.get("time"), now)
    return Warned(ACTIONS[kind] if left_s is None else left_s)


class ScheduledEvents:
    """Azure: Preempt events of Scheduled Events.

    Events are for all machines of an availability or scale set, so this machine's name must be in them. If the service
    does not tell the name, any Preempt event counts: to leave once too often costs less than the other mistake.

    Does not acknowledge events: Azure could then take *all* machines of the event at once, for a gain of a few seconds.
    The other types (Freeze, Reboot, Redeploy, Terminate) come minutes to days ahead: regular checkpoints are enough.
    """

    name = "azure scheduled event Preempt"
    every_s = 1.0  # what Azure recommends

    def __init__(self, endpoint: str = ENDPOINT) -> None:
        self._endpoint = endpoint.rstrip("/")
        self._machine = ""

    def probe(self, now: float) -> Warned | None:
        # Azure's first answer may take two minutes; repeated short requests start them as well as one long wait.
        url = f"{self._endpoint}/metadata/scheduledevents?api-version=2020-07-01"
        preempts = read_preempts(ask_body(url, {"Metadata": "true"}))
        if not preempts:
            return None
        if not self._machine:
            url = f"{self._endpoint}/metadata/instance/compute/name?api-version=2021-02-01&format=text"
            with suppress(NoAnswer):
                self._machine = ask_body(url, {"Metadata": "true"}).strip()
        mine = [event for event in preempts if is_for(event, self._machine)]
        times = [seconds_until(event.get("NotBefore"), now) for event in mine]
        # An event that has started has no time any more: like a time that cannot be read.
        return Warned(min((time for time in times if time is not None), default=None)) if mine else None


def read_preempts(body: str) -> list[dict[str, Any]]:
    """Returns the Preempt events of a document; raises NoAnswer for any other document."""
    events = read_object(body).get("Events")
    if not isinstance(events, list):
        raise NoAnswer(f"no list of events: {body[:80]!r}")
    return [event for event in events if isinstance(event, dict) and event.get("EventType") == "Preempt"]


def is_for(event: dict[str, Any], machine: str) -> bool:
    """Returns whether an event takes this machine; true if either side names no machine."""
    resources = event.get("Resources")
    if not machine or not isinstance(resources, list) or not resources:
        return True
    return machine.lower() in [str(name).lower() for name in resources]


class Preempted:
    """GCP: ``instance/preempted`` of the metadata server, TRUE from the moment when the machine is being taken.

    It does not say how long is left: 30 s, during which the system shuts down. Asked every second instead of by
    ``wait_for_change``: that request would hang on a connection that has died silently.
    """

    name = "gcp instance/preempted"
    every_s = 1.0

    def __init__(self, host: str = HOST) -> None:
        self._url = f"http://{host}/computeMetadata/v1/instance/preempted"

    def probe(self, now: float) -> Warned | None:
        match ask_body(self._url, {"Metadata-Flavor": "Google"}).strip():
            case "TRUE":
                return Warned(None)
            case "FALSE":
                return None
            case other:
                raise NoAnswer(f"neither TRUE nor FALSE: {other[:80]!r}")


@dataclass(frozen=True)
class Pod:
    """The place of this pod's record; ``server`` is the API server's URL."""

    server: str
    namespace: str
    name: str
    account: Path


def this_pod(environ: Mapping[str, str], account: Path = ACCOUNT) -> Pod | None:
    """Returns the pod of this process, None if there is none or it may not ask."""
    host, port = environ.get("KUBERNETES_SERVICE_HOST", ""), environ.get("KUBERNETES_SERVICE_PORT", "443")
    name = environ.get("SKYPILOT_POD_NAME") or environ.get("HOSTNAME", "")
    try:
        namespace = (account / "namespace").read_text().strip()
    except OSError:
        return None
    if not (host and name and (account / "token").exists()):
        return None
    return Pod(f"https://{f'[{host}]' if ':' in host else host}:{port}", namespace, name, account)


class PodDeletion:
    """Kubernetes: the deletion of this pod, from its API server.

    A pod that is evicted, drained or preempted gets a ``deletionTimestamp``, the time of its kill. The SIGTERM goes
    only to the pod's first process, in SkyPilot's pods a shell that does not pass it on to the guard.
    """

    name = "kubernetes pod deletion"
    every_s = 5.0  # the server is shared by all pods of the cluster

    def __init__(self, pod: Pod) -> None:
        self._pod = pod
        self._url = f"{pod.server}/api/v1/namespaces/{pod.namespace}/pods/{pod.name}"

    def probe(self, now: float) -> Warned | None:
        try:  # each time: the kubelet renews both files
            token = (self._pod.account / "token").read_text().strip()
            tls = ssl.create_default_context(cafile=str(self._pod.account / "ca.crt"))
        except OSError as error:  # SSLError is one
            raise NoAnswer(f"the service account cannot be used: {error}") from error
        # Only the pod's head: a few hundred bytes.
        accept = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1, application/json"
        headers = {"Authorization": f"Bearer {token}", "Accept": accept}
        return read_deletion(ask_body(self._url, headers, tls), now)


def read_deletion(body: str, now: float) -> Warned | None:
    """Returns the pod's planned end, None if none is planned; raises NoAnswer if the answer is not a pod."""
    head = read_object(body).get("metadata")
    if not isinstance(head, dict):
        raise NoAnswer(f"no pod: {body[:80]!r}")
    deletion = head.get("deletionTimestamp")
    return Warned(seconds_until(deletion, now)) if deletion else None


# Each has ``name`` and ``every_s``. ``probe`` asks once; it raises NoAnswer for an answer that it cannot understand.
NoticeSource = SpotAction | ScheduledEvents | Preempted | PodDeletion


def sources_for(infra: str, environ: Mapping[str, str], dmi: Path = DMI) -> list[NoticeSource]:
    """Returns the services that can warn this machine, from names and files alone; asks nothing.

    SkyPilot says whose machine this is. Otherwise (by hand; a Slurm node or a pod may be a cloud's machine too) the
    firmware does, as the kernel shows it in ``/sys/class/dmi/id``.
    """
    found: list[NoticeSource] = []
    if infra == "kubernetes" and (pod := this_pod(environ)):
        found.append(PodDeletion(pod))
    if infra in ("", "slurm", "kubernetes"):  # these run on any cloud's machines
        infra = cloud_of(dmi)
    if infra == "aws" and environ.get(environment.AWS_METADATA_DISABLED, "").lower() != "true":
        found.append(SpotAction(environ.get(environment.AWS_METADATA) or ENDPOINT))
    elif infra == "gcp":
        found.append(Preempted(environ.get(environment.GCP_METADATA) or HOST))
    elif infra == "azure":
        found.append(ScheduledEvents(environ.get(environment.AZURE_METADATA) or ENDPOINT))
    return found


def cloud_of(dmi: Path = DMI) -> str:
    """Returns the cloud that the firmware names: aws, gcp, azure, or empty."""
    facts = dict.fromkeys(("sys_vendor", "product_name", "bios_version", "chassis_asset_tag"), "")
    for name in facts:
        with suppress(OSError, ValueError):  # missing, forbidden, not text
            facts[name] = (dmi / name).read_text().strip()
    # Older instance types are Xen machines, which only their BIOS tells from others.
    if facts["sys_vendor"] == "Amazon EC2" or facts["bios_version"].endswith("amazon"):
        return "aws"
    if facts["product_name"] == "Google Compute Engine":
        return "gcp"
    if facts["sys_vendor"] == "Microsoft Corporation" and facts["chassis_asset_tag"] == AZURE_TAG:
        return "azure"
    return ""


class NoticeWatcher:
    """Asks all sources in one thread, if there are any. Logs a failing one once, and asks it ever more slowly."""

    def __init__(self, sources: Sequence[NoticeSource], notices: Notices, clock: Clock = time.time) -> None:
        self._notices, self._clock = notices, clock
        self._due, self._failures = dict.fromkeys(sources, 0.0), dict.fromkeys(sources, 0)  # due: monotonic
        self._named: set[NoticeSource] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="notices", daemon=True)

    def __enter__(self) -> "NoticeWatcher":
        if self._due:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Does not wait for a running request."""
        self._stop.set()

    def _work(self) -> None:
        while self._due:
            source = min(self._due, key=self._due.__getitem__)
            if self._stop.wait(max(self._due[source] - time.monotonic(), 0.0)):
                return
            pause_s = self.ask(source)
            if pause_s is None:
                del self._due[source]
            else:
                self._due[source] = time.monotonic() + pause_s

    def ask(self, source: NoticeSource) -> float | None:
        """Asks once; returns the seconds until the next try, None once the source has given its notice."""
        try:
            warned = source.probe(self._clock())
        except NoAnswer as fault:
            if source not in self._named:
                self._named.add(source)
                log(f"{source.name}: {fault}; asked again until it answers")
            self._failures[source] += 1
            return min(source.every_s * (1 << min(self._failures[source], 8)), SLOWEST_S)
        self._failures[source] = 0
        if warned is None:
            return source.every_s
        self._notices.give(source.name, warned.grace_s)
        return None
