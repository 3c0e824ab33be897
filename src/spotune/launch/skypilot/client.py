"""The one door to SkyPilot: its client is imported here and nowhere else, and its errors end here."""

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from spotune.core.errors import InfraError, InputError, SpotuneError
from spotune.core.io import LogLines

# SkyPilot's API server, and what of it makes a report inexact or a launch slow: pure.

CONTROLLER_CPU_S = 8  # to start one


@dataclass(frozen=True)
class Server:
    """The API server; ``consolidation`` and ``controllers`` are None where it cannot be told from here.

    Attributes:
        consolidation: its job controllers run inside it, not on a machine of their own.
        controllers: how many of them run, and ``controllers_mb``: the memory that they hold.
        free_mb: memory that its machine has left, and its ``cpus``.
    """

    url: str
    version: str
    is_local: bool
    consolidation: bool | None = None
    controllers: int | None = None
    controllers_mb: float = 0.0
    free_mb: float = 0.0
    cpus: int = 0


def server_problems(server: Server) -> list[str]:
    """What of the server makes cost inexact or launches slow."""
    problems = []
    if server.consolidation is False:
        problems.append(
            "consolidation mode is off: SkyPilot's history of machines is on the controller's and spotune cost has only"
            " what the machines said themselves (jobs: {controller: {consolidation_mode: true}} in ~/.sky/config.yaml)"
        )
    if server.consolidation is None:
        problems.append(
            "whether consolidation mode is on cannot be told from here: cost is exact only where it is (who runs the"
            " server: jobs: {controller: {consolidation_mode: true}} in its config)"
        )
    many = server.controllers or 0
    if many and server.controllers_mb > server.free_mb:
        problems.append(
            f"{many} job controllers hold {server.controllers_mb:.0f} MB of memory and {server.free_mb:.0f} MB are left"
            " (SkyPilot starts one for each 0.8 GB that it takes for its own: give its server a limit of memory)"
        )
    if many and server.cpus and many > 2 * server.cpus:
        seconds = many * CONTROLLER_CPU_S / server.cpus
        problems.append(f"{many} job controllers on {server.cpus} CPUs: {seconds:.0f} s each time the server starts")
    return problems


# What SkyPilot's client raises, as our errors of one line with what to do about it.
#
# Its server sends exceptions by name: a builtin, one of SkyPilot's own, or a bare ``Exception`` for any other. So every
# exception in a call to the client is taken for SkyPilot's.

MOST = 600  # characters of what went wrong; some list all that was tried
MOST_FIX = 240
_BUSY = "the API server is busy, try again"
_VERSION = "install the SkyPilot version of the API server"
_ACCESS = "sky check says what is missing"
_REACH = "sky api info says whether the server answers"
_ACCOUNT = "log in to the cloud's account that it was launched with"
# SkyPilot's exception -> what to do about it. The message itself is SkyPilot's.
_REMEDIES = {
    "ApiServerConnectionError": "sky api start, or sky api login for a team's server",
    "ApiServerAuthenticationError": "sky api login",
    "APIVersionMismatchError": _VERSION,
    "APINotSupportedError": _VERSION,
    "NoCloudAccessError": _ACCESS,
    "InvalidCloudConfigs": _ACCESS,
    "InvalidCloudCredentials": _ACCESS,
    "CloudUserIdentityError": _ACCESS,
    "CloudError": "the cloud's own word: its console, or sky check",
    "ClusterOwnerIdentityMismatchError": _ACCOUNT,
    "ResourcesUnavailableError": "other --gpus, --cpus or --memory, another --infra, or later",
    "KubeAPIUnreachableError": "kubectl get pods says whether the context answers",
    "NotSupportedError": "another --infra, or a task without it",
    "ClusterNotUpError": "spotune dev ls says how it stands",
    "ClusterDoesNotExist": "spotune dev ls says which there are",
    "ClusterStatusFetchingError": "sky status --refresh says how it stands",
    "CachedClusterUnavailable": "sky status --refresh says how it stands",
    "PermissionDeniedError": "whoever runs the API server can allow it",
    "NoWorkspaceAccessError": "whoever runs the API server can allow it",
    "WorkspaceAmbiguousError": "active_workspace: NAME in ~/.sky/config.yaml",
    "StorageError": "sky check says which storage may be used",
    "RequestCancelled": "somebody cancelled the request: try again",
    "RequestInterruptedError": "the API server was started anew: try again",
    "ConcurrentWorkerExhaustedError": _BUSY,
    "ServerTemporarilyUnavailableError": _BUSY,
    "OperationalError": _BUSY,
    "ConnectionError": _REACH,
    "ConnectTimeout": _REACH,
    "ReadTimeout": _REACH,
    "SSLError": _REACH,
    "HTTPError": _REACH,
}
_FAULT = "a fault of SkyPilot's: sky api status -a names the request, sky api logs ID shows it"
_USERS = ("InvalidSkyPilotConfigError", "InvalidClusterNameError", "UserRequestRejectedByPolicy", "ValueError")
# What tells nothing without its name, and is nothing that a user did.
_FAULTS = ("AssertionError", "AttributeError", "Exception", "IndexError", "KeyError", "NameError", "TypeError")
_FIX = re.compile(r"\s*\bTo fix(?: this)?[:,]\s*")
_HINT = re.compile(r"\s*\b(?:Hint: |To see the details, run: )")
_PASSWORD = re.compile(r"(://[^/\s:@]*):[^/\s]*@")


@contextmanager
def translated(where: str = "SkyPilot") -> Iterator[None]:
    """Turns SkyPilot's exceptions into ours: bad input names ``where`` it was given, all else is an InfraError."""
    try:
        yield
    except (SpotuneError, BrokenPipeError):  # ours; and whoever read what we printed has left
        raise
    except Exception as error:
        name = type(error).__name__
        text, fix = one_line(error)
        if name in _USERS:
            raise InputError(where, text, remedy=fix) from error
        if name in _FAULTS:
            text = text if name == "Exception" else f"{name}: {text}"
        remedy = "; ".join(part for part in (_remedy(error), fix) if part)
        raise InfraError(f"SkyPilot: {text}{f' ({remedy})' if remedy else ''}") from error


def one_line(error: BaseException) -> tuple[str, str]:
    """(what an exception of SkyPilot's says, what it advises), without colours, line breaks and passwords."""
    text = masked(" ".join(plain(str(error)).split()))
    what, *fixes = _FIX.split(text, maxsplit=1)
    fix = _HINT.split(fixes[0])[0] if fixes else ""
    what = _HINT.split(what)[0]
    return _cut(what, MOST) or type(error).__name__, _cut(fix, MOST_FIX)


def masked(text: str) -> str:
    """Without the passwords that URLs in it hold: a team's server is logged in to by one."""
    return _PASSWORD.sub(r"\1:***@", text)


def _remedy(error: BaseException) -> str:
    kinds = [kind.__name__ for kind in type(error).__mro__]
    found = next((_REMEDIES[kind] for kind in kinds if kind in _REMEDIES), "")
    return found or (_FAULT if kinds[0] in _FAULTS else "")


def _cut(text: str, most: int) -> str:
    text = text.strip().rstrip(".")
    return text if len(text) <= most else f"{text[:most].rstrip()} …"


# The one door to SkyPilot: its client is imported here and nowhere else, and its errors end here (``refusals.py``).
#
# ``import sky`` costs seconds of CPU, so no verb comes here before it knows that SkyPilot has something to say.


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

        running = find_controllers(Path.home())
        return replace(
            found,
            consolidation=controller_utils.is_jobs_consolidation_mode(),
            controllers=running.count,
            controllers_mb=running.memory_mb,
            free_mb=free_memory_mb(),
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


# What SkyPilot prints of a job, as the lines that the job printed.

_TAKEN_DOWN = 137  # SkyPilot kills the others when one machine's process fails
_COLOUR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
# (NAME, pid=123) text, and (worker1, rank=1, pid=123, ip=10.0.0.2) text
_PREFIX = re.compile(r"^\((?P<name>[^()]*?)(?:, rank=(?P<rank>\d+))?, pid=\d+(?:, ip=[^)]*)?\) ?")
_OF_SKYPILOT = re.compile(
    r"^(?:[├└]── |↳|✓ |✗ |⚙︎|[⠀-⣿]|Hint: |(?:Managed )?[Jj]ob finished|Waiting for task |<sky-payload|"
    r"The job cluster is preempted|Start streaming logs|ERROR: Job \d+ failed with return code)"
)
# What follows a last line that the program did not end, on that line.
_GLUED = re.compile(r"[✓✗] Job finished \(status: [A-Z_]+\)\.$")
_ANSI_CODES = re.compile(r"^ERROR: Job \d+ failed with return code list: *\[([\d, ]+)\]", re.MULTILINE)
_BEGIN, _END = re.compile(r"^== Logs of the user job \(ID: \d+\) ==$"), re.compile(r"^== End of logs \(ID: \d+\) ==$")


def plain(text: str) -> str:
    """Without SkyPilot's colours."""
    return _COLOUR.sub("", text)


def lines_of(pieces: Iterable[str | None]) -> Iterator[str]:
    """Whole lines from a stream of text; a last one that was never ended too. None is SkyPilot's spinner moving."""
    lines = LogLines()
    for piece in pieces:
        yield from lines.add(piece or "")
    yield from lines.last()


def exit_code(log: str) -> int | None:
    """What the program of a failed job ended with, None where the log does not say it."""
    found = _ANSI_CODES.search(plain(log))
    return deciding(int(code) for code in found[1].split(",")) if found else None


def deciding(codes: Iterable[int]) -> int:
    """Of several machines' exit codes the first of one that failed by itself; 0 when none failed."""
    failed = [code for code in codes if code]
    return next((code for code in failed if code != _TAKEN_DOWN), failed[0] if failed else 0)


def begins(line: str) -> bool:
    """Whether a log begins here: of a further machine, where one stream goes on to it."""
    return plain(line).startswith("├── Waiting for task resources")


def said(line: str) -> str | None:
    """A line as the program wrote it, None where SkyPilot itself speaks. Of several machines the rank is kept."""
    line = plain(line).rstrip("\r")
    found = _PREFIX.match(line)
    if not found:
        return None if _OF_SKYPILOT.match(line) or not line.strip() else line
    text = _GLUED.sub("", line[found.end() :])
    rank = found["rank"]
    return f"[{rank}] {text}" if rank and rank != "0" else text


def attempts_in(controller: Iterable[str]) -> list[list[str]]:
    """What the program printed in each attempt that ended by itself, from the controller's log.

    SkyPilot keeps a job's log of its last machine only, but its controller copies what it reads before it lets a
    machine go. Of a machine that vanished there was nothing left to read.
    """
    found: list[list[str]] = []
    inside = False
    for line in controller:
        bare = plain(line).strip()
        if _BEGIN.match(bare):
            found.append([])
            inside = True
        elif _END.match(bare):
            inside = False
        elif inside and (text := said(line)) is not None:
            found[-1].append(text)
    return found


# SkyPilot's job controllers on this machine: as it wrote them down, and as they are.

PIDS = ".sky/job_controller_pid"  # a line each, ``PID,STARTED_AT``; those that have gone stay in it
_SLACK_S = 1.0
_MB = 2**20


@dataclass(frozen=True)
class Controllers:
    """How many run, and what memory they and their children hold."""

    count: int
    memory_mb: float


def find_controllers(home: Path) -> Controllers:
    """Those below ``~``; a process that has got the number of one that has gone is none."""
    try:
        lines = (home / PIDS).read_text().split()
    except OSError:
        return Controllers(0, 0.0)
    held = [mb for line in lines if (mb := _memory_mb(*line.partition(",")[::2])) is not None]
    return Controllers(len(held), sum(held))


def _memory_mb(pid: str, started_at: str) -> float | None:
    import psutil  # here: for `check` alone

    try:
        process = psutil.Process(int(pid))
        if started_at and abs(process.create_time() - float(started_at)) > _SLACK_S:
            return None
        family = [process, *process.children(recursive=True)]
        return sum(one.memory_info().rss for one in family) / _MB
    except (ValueError, psutil.Error):
        return None


def free_memory_mb() -> float:
    """What this machine has left for further processes."""
    import psutil  # here: for `check` alone

    return psutil.virtual_memory().available / _MB
