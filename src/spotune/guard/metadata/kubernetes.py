"""Kubernetes: the deletion of this pod, as its API server says it.

A pod that is evicted, drained or preempted gets a ``deletionTimestamp``: the time at which it will be killed. The
SIGTERM goes to the pod's first process only, which in SkyPilot's pods is a shell that keeps it to itself, so that
without this the guard would hear of nothing.
"""

import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from spotune.guard.metadata.ask import ask
from spotune.guard.metadata.source import NoAnswer, Warned, read_object, seconds_until

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
# The pod's head alone is a few hundred bytes.
ACCEPT = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1, application/json"


@dataclass(frozen=True)
class Pod:
    """Where this pod's record is: ``server`` is the API server's URL."""

    server: str
    namespace: str
    name: str
    account: Path


def this_pod(environ: Mapping[str, str], account: Path = ACCOUNT) -> Pod | None:
    """The pod that we are in, None when there is none or it may not ask."""
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
    name = "kubernetes pod deletion"
    every_s = 5.0  # the server is shared by all pods of the cluster

    def __init__(self, pod: Pod) -> None:
        self._pod = pod
        self._url = f"{pod.server}/api/v1/namespaces/{pod.namespace}/pods/{pod.name}"

    def look(self, now: float) -> Warned | None:
        try:  # each time: the kubelet renews both files
            token = (self._pod.account / "token").read_text().strip()
            tls = ssl.create_default_context(cafile=str(self._pod.account / "ca.crt"))
        except OSError as error:  # SSLError is one
            raise NoAnswer(f"the service account cannot be used: {error}") from error
        answer = ask(self._url, {"Authorization": f"Bearer {token}", "Accept": ACCEPT}, tls=tls)
        if answer.status != 200:
            raise NoAnswer(f"status {answer.status}")
        return read_deletion(answer.body, now)


def read_deletion(body: str, now: float) -> Warned | None:
    """The pod's planned end; raises NoAnswer when this is no pod."""
    head = read_object(body).get("metadata")
    if not isinstance(head, dict):
        raise NoAnswer(f"no pod: {body[:80]!r}")
    deletion = head.get("deletionTimestamp")
    return Warned(seconds_until(deletion, now)) if deletion else None
