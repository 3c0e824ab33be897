"""The one door to SkyPilot: its client is imported here and nowhere else, and its errors end here (``refusals.py``).

``import sky`` costs seconds of CPU, so no verb comes here before it knows that SkyPilot has something to say.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from spotune.contracts.errors import InfraError
from spotune.launch.skypilot.refusals import masked
from spotune.launch.skypilot.refusals import translated as translated
from spotune.launch.skypilot.server import Server


@dataclass(frozen=True)
class Machine:
    """What SkyPilot's provisioner needs of a cluster: its name there, ``provider`` and its settings ``config``."""

    name: str
    provider: str
    config: Mapping[str, Any]
    nodes: int = 1
    workspace: str = "default"


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


# What SkyPilot is asked, each in SkyPilot's own values.


def call(ask_for: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """The result of one of the client's functions."""
    with translated():
        return sdk().get(ask_for(*arguments, **options))


def task(config: Mapping[str, Any], where: str = "task") -> Any:
    """A ``sky.Task``; raises InputError naming ``where`` when SkyPilot cannot use it."""
    with translated(where):
        return sdk().Task.from_yaml_config(json.loads(json.dumps(config)))  # a copy: SkyPilot changes what it is given


def launch(job: Any, name: str) -> Any:
    """Submits a task as a managed job; returns the request, whose result is (ids, handle)."""
    with translated():
        return sdk().jobs.launch(job, name=name)


def end_launches(name: str) -> bool:
    """Ends the requests under way that submit managed jobs of this name; returns whether there was one.

    To stop waiting for a request does not stop it. One that is told to end may have got its job into the queue before.
    """
    with translated():
        client = sdk()
        under_way = [
            one.request_id for one in client.api_status() if one.name == _LAUNCH and _body(one)["name"] == name
        ]
        if under_way:
            client.get(client.api_cancel(under_way, silent=True))
    return bool(under_way)


def _body(request: Any) -> dict[str, Any]:
    """What a request was given; of somebody else's nothing is told."""
    return {"name": None, **(json.loads(request.request_body) or {})}


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


def check_answers() -> None:
    """Raises InfraError where no API server answers; every other question starts one on this machine."""
    with translated():
        sdk()
        from sky.server import common

        status = common.get_api_server_status().status.value
    if status != "healthy":
        raise InfraError(f"no API server of SkyPilot's answers: {status} (sky api login for a team's server)")


def server() -> Server:
    """The API server, and what can be told of it from here: of a local one, that is on this machine, most."""
    with translated():
        client = sdk()
        from sky.server import common
        from sky.utils import common_utils, controller_utils

        common.check_server_healthy()  # as every other request does; api_info alone says less of one that is away
        health = client.api_info()
        url = common.get_server_url()
        found = Server(url=masked(url), version=str(health.version), is_local=common.is_api_server_local(url))
        if not found.is_local:
            return found
        from spotune.launch.skypilot import controllers  # here: psutil, for `check` alone

        running = controllers.find_controllers(Path.home())
        return replace(
            found,
            consolidation=controller_utils.is_jobs_consolidation_mode(),
            controllers=running.count,
            controllers_mb=running.memory_mb,
            free_mb=controllers.free_memory_mb(),
            cpus=common_utils.get_cpu_count(),
        )


def machine(cluster: str) -> Machine | None:
    """The record of a cluster, None where this machine's SkyPilot has none: the API server is elsewhere, say."""
    with translated():
        sdk()
        from sky import global_user_state
        from sky.server import common

        record = global_user_state.get_cluster_from_name(cluster) if common.is_api_server_local() else None
        if record is None:
            return None
        handle = record["handle"]
        config = global_user_state.get_cluster_yaml_dict(handle.cluster_yaml)
        return Machine(
            name=handle.cluster_name_on_cloud,
            provider=repr(handle.launched_resources.cloud),
            config=config["provider"],
            nodes=handle.launched_nodes,
            workspace=record["workspace"],
        )


def terminate(machine: Machine) -> None:
    """Terminates all instances of a cluster; SkyPilot finds out when it next looks."""
    with translated():
        sdk()
        from sky import provision, skypilot_config

        with skypilot_config.local_active_workspace_ctx(machine.workspace):
            provision.terminate_instances(machine.provider, machine.name, dict(machine.config))


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
_LAUNCH = "sky.jobs.launch"  # as the API server names the request


def _epoch(value: Any) -> float:
    if isinstance(value, (int, float)):
        return float(value)
    return (value if isinstance(value, datetime) else datetime.fromisoformat(str(value))).timestamp()


def _status(value: Any) -> str:
    return str(getattr(value, "value", value))
