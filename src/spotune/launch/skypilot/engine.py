"""The one door to SkyPilot: its client is imported here and nowhere else, and its errors end here as one line.

``import sky`` costs seconds of CPU, so no verb comes here before it knows that SkyPilot has something to say.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from spotune.contracts.errors import InfraError, InputError
from spotune.launch.skypilot.logs import plain
from spotune.launch.skypilot.server import Server

# SkyPilot's exception -> what to do about it. The message itself is SkyPilot's.
_REMEDIES = {
    "ApiServerConnectionError": "sky api start, or sky api login for a team's server",
    "ApiServerAuthenticationError": "sky api login",
    "APIVersionMismatchError": "install the SkyPilot version of the API server",
    "NoCloudAccessError": "sky check says what is missing",
    "InvalidCloudCredentials": "sky check says what is missing",
    "ResourcesUnavailableError": "other --gpus, --cpus or --memory, another --infra, or later",
    "ConcurrentWorkerExhaustedError": "the API server is busy, try again",
    "ServerTemporarilyUnavailableError": "the API server is busy, try again",
}
_USERS = ("InvalidSkyPilotConfigError", "InvalidClusterNameError", "UserRequestRejectedByPolicy", "ValueError")


def sdk() -> Any:
    """The module ``sky``; raises InfraError where it is not installed."""
    try:
        with redirect_stdout(sys.stderr):  # its loggers keep the stream that they find; ours is for results
            import sky
    except ImportError as error:
        raise InfraError(f"SkyPilot cannot be imported: {error} (make setup)") from error
    return sky


def ask(request_id: Any) -> Any:
    """The result of a request; every call of SkyPilot's client returns one. Raises InfraError or InputError."""
    with translated():
        return sdk().get(request_id)


def watch(request_id: Any, output: Any = None) -> Any:
    """As ``ask``, while what the server says of the request goes to ``output`` (a text stream; default stdout)."""
    with translated():
        return sdk().stream_and_get(request_id, output_stream=output)


@contextmanager
def translated(where: str = "SkyPilot") -> Iterator[None]:
    """Turns SkyPilot's exceptions into ours: bad input names ``where`` it was given, all else is an InfraError."""
    import click
    import requests

    kinds: list[type[Exception]] = [click.ClickException, requests.RequestException, ValueError, RuntimeError, OSError]
    kinds += [
        kind for kind in vars(sdk().exceptions).values() if isinstance(kind, type) and issubclass(kind, Exception)
    ]
    try:
        yield
    except tuple(kinds) as error:
        name, text = type(error).__name__, one_line(error)
        if name in _USERS:
            raise InputError(where, text) from error
        remedy = _REMEDIES.get(name)
        raise InfraError(f"SkyPilot: {text}{f' ({remedy})' if remedy else ''}") from error


def one_line(error: BaseException) -> str:
    """What an exception of SkyPilot's says, without its colours and line breaks."""
    text = " ".join(plain(str(error)).split()).split(" To fix: ")[0].rstrip(".")
    return text or type(error).__name__


# What SkyPilot is asked, each in SkyPilot's own values.


def call(ask_for: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """The result of one of the client's functions."""
    with translated():
        return sdk().get(ask_for(*arguments, **options))


def task(config: Mapping[str, Any], where: str = "task") -> Any:
    """A ``sky.Task``; raises InputError naming ``where`` when SkyPilot cannot use it."""
    with translated(where):
        return sdk().Task.from_yaml_config(json.loads(json.dumps(config)))  # a copy: SkyPilot changes what it is given


def launch(config: Mapping[str, Any], name: str) -> list[int]:
    """Submits a managed job; returns its ids."""
    job = task(config)
    ids, _ = call(sdk().jobs.launch, job, name=name)
    return list(ids or [])


def check_feasible(job: Any) -> None:
    """Raises InfraError when no enabled cloud has what the task asks for."""
    with translated():
        client = sdk()
        with client.Dag() as dag:
            dag.add(job)
        client.get(client.optimize(dag))


def managed_jobs(fields: Sequence[str], everyone: bool, name: str = "", ids: Sequence[int] = ()) -> list[Any]:
    """ManagedJobRecords: all, those whose name holds ``name``, or those with these ids."""
    options = {"name_match": name or None, "job_ids": list(ids) or None}
    found = call(
        sdk().jobs.queue_v2, refresh=False, all_users=everyone or bool(name or ids), fields=list(fields), **options
    )
    return list(found[0])


def events(job_id: int) -> list[tuple[float, str, str]]:
    """(epoch seconds, status, reason) of a managed job's changes, oldest first."""
    rows = _post("/jobs/events", "GetJobEventsBody", job_id=job_id, limit=None)
    return sorted((_epoch(row["timestamp"]), _status(row["new_status"]), row.get("reason") or "") for row in rows)


def cost_rows(names: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of ``cost_report`` for clusters of these names, however old."""
    return list(_post("/cost_report", "CostReportBody", days=_EVER_DAYS, cluster_names=list(names)))


def _post(path: str, body: str, **fields: Any) -> Any:
    """The result of a request that the client has no function for, or none with these fields."""
    with translated():
        client = sdk()
        from sky.server import common
        from sky.server.requests import payloads

        content = json.loads(getattr(payloads, body)(**fields).model_dump_json())
        return client.get(common.get_request_id(common.make_authenticated_request("POST", path, json=content)))


def excluded_files(folder: str) -> list[str]:
    """What of a folder is not sent, files and folders relative to it: as git ignores, or as .skyignore says."""
    with translated():
        sdk()
        from sky.data import storage_utils

        return list(storage_utils.get_excluded_files(folder))


def enabled_clouds() -> list[str]:
    """As ``sky check`` left them, in our spelling."""
    with translated():
        sdk()
        from sky.client import sdk as client

    return [str(name).lower() for name in call(client.enabled_clouds)]


def server() -> Server:
    """The API server, and what can be told of it from here: of a local one, that is on this machine, most."""
    with translated():
        client = sdk()
        from sky.server import common
        from sky.utils import common_utils, controller_utils

        health = client.api_info()
        url = common.get_server_url()
        found = Server(url=url, version=str(health.version), is_local=common.is_api_server_local(url))
        if not found.is_local:
            return found
        return replace(
            found,
            consolidation=controller_utils.is_jobs_consolidation_mode(),
            controllers=_controllers(),
            memory_mb=common_utils.get_mem_size_gb() * 1024,
            cpus=common_utils.get_cpu_count(),
        )


def _controllers() -> int | None:
    """How many job controllers the local server has started; None before it started any."""
    try:
        lines = Path("~/.sky/job_controller_pid").expanduser().read_text().split()
    except OSError:
        return None
    return len(lines)


def cloud(name: str) -> Any:
    """SkyPilot's object for a cloud."""
    with translated():
        sdk()
        from sky.utils import registry

        return registry.CLOUD_REGISTRY.from_str(name)


def log_pieces(job_id: int, follow: bool, controller: bool = False) -> Iterator[str | None]:
    """Text of a managed job's log, or of its controller's, as it comes."""
    with translated():
        pieces = sdk().jobs.tail_logs(job_id=job_id, follow=follow, controller=controller, preload_content=False)
    while True:
        with translated():
            try:
                piece = next(pieces)
            except StopIteration:
                return
        yield piece


_EVER_DAYS = 3650


def _epoch(value: Any) -> float:
    if isinstance(value, (int, float)):
        return float(value)
    return (value if isinstance(value, datetime) else datetime.fromisoformat(str(value))).timestamp()


def _status(value: Any) -> str:
    return str(getattr(value, "value", value))
