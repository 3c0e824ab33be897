"""The one door to SkyPilot: its client is imported here and nowhere else, and its errors end here."""

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from spotune.core.errors import InfraError, InputError, SpotuneError
from spotune.core.io import LogLines


@dataclass(frozen=True)
class ApiServer:
    """SkyPilot's API server; None is unknown."""

    url: str
    version: str
    is_local: bool
    consolidation: bool | None = None  # its job controllers run inside it
    controllers: int | None = None  # how many run
    controllers_mb: float = 0.0  # memory that they hold
    free_mb: float = 0.0  # memory that its machine has left
    cpus: int = 0


def server_problems(server: ApiServer) -> list[str]:
    """Returns what makes costs inexact or launches slow, a line each."""
    problems = []
    if server.consolidation is False:
        problems.append(
            "consolidation mode is off: SkyPilot's history of machines is on the controller, and spotune cost has only"
            " the machines' own records (jobs: {controller: {consolidation_mode: true}} in ~/.sky/config.yaml)"
        )
    if server.consolidation is None:
        problems.append(
            "whether consolidation mode is on cannot be told from here, and costs are exact only if it is (on the"
            " server: jobs: {controller: {consolidation_mode: true}} in its config)"
        )
    many = server.controllers or 0
    if many and server.controllers_mb > server.free_mb:
        problems.append(
            f"{many} job controllers hold {server.controllers_mb:.0f} MB of memory and {server.free_mb:.0f} MB are left"
            " (SkyPilot starts one for each 0.8 GB that it counts as its own: limit the server's memory)"
        )
    if many and server.cpus and many > 2 * server.cpus:
        seconds = many * 8 / server.cpus  # starting one takes 8 CPU seconds
        problems.append(f"{many} job controllers on {server.cpus} CPUs: {seconds:.0f} s each time the server starts")
    return problems


MOST = 600  # characters of a message; some list everything that was tried
MOST_FIX = 240
# SkyPilot's exception -> what to do about it. The message itself is SkyPilot's.
_REMEDIES = {
    "ApiServerConnectionError": "sky api start, or sky api login for a team's server",
    "ApiServerAuthenticationError": "sky api login",
    **dict.fromkeys(
        ("APIVersionMismatchError", "APINotSupportedError"), "install the SkyPilot version of the API server"
    ),
    **dict.fromkeys(
        ("NoCloudAccessError", "InvalidCloudConfigs", "InvalidCloudCredentials", "CloudUserIdentityError"),
        "sky check says what is missing",
    ),
    "CloudError": "see the cloud's console, or sky check",
    "ClusterOwnerIdentityMismatchError": "log in to the cloud account that launched it",
    "ResourcesUnavailableError": "other --gpus, --cpus or --memory, another --infra, or later",
    "KubeAPIUnreachableError": "kubectl get pods says whether the context answers",
    "NotSupportedError": "another --infra, or a task without it",
    "ClusterNotUpError": "spotune dev ls shows its status",
    "ClusterDoesNotExist": "spotune dev ls shows the clusters",
    **dict.fromkeys(
        ("ClusterStatusFetchingError", "CachedClusterUnavailable"), "sky status --refresh shows its status"
    ),
    **dict.fromkeys(("PermissionDeniedError", "NoWorkspaceAccessError"), "the API server's admin can allow it"),
    "WorkspaceAmbiguousError": "active_workspace: NAME in ~/.sky/config.yaml",
    "StorageError": "sky check says which storage may be used",
    "RequestCancelled": "somebody cancelled the request: try again",
    "RequestInterruptedError": "the API server was restarted: try again",
    **dict.fromkeys(
        ("ConcurrentWorkerExhaustedError", "ServerTemporarilyUnavailableError", "OperationalError"),
        "the API server is busy, try again",
    ),
    **dict.fromkeys(
        ("ConnectionError", "ConnectTimeout", "ReadTimeout", "SSLError", "HTTPError"),
        "sky api info says whether the server answers",
    ),
}
_USERS = ("InvalidSkyPilotConfigError", "InvalidClusterNameError", "UserRequestRejectedByPolicy", "ValueError")
# Faults of SkyPilot itself; their message says nothing without the name.
_FAULTS = ("AssertionError", "AttributeError", "Exception", "IndexError", "KeyError", "NameError", "TypeError")
_FIX = re.compile(r"\s*\bTo fix(?: this)?[:,]\s*")
_HINT = re.compile(r"\s*\b(?:Hint: |To see the details, run: )")
_PASSWORD = re.compile(r"(://[^/\s:@]*):[^/\s]*@")


@contextmanager
def translated(where: str = "SkyPilot") -> Iterator[None]:
    """Turns SkyPilot's exceptions into ours: bad input becomes an InputError of ``where``, the rest InfraErrors.

    The server sends exceptions by name: a builtin, one of SkyPilot's own, or a bare ``Exception`` for any other. So any
    exception in a call to the client counts as SkyPilot's.
    """
    try:
        yield
    except (SpotuneError, BrokenPipeError):  # ours; and the reader of our output has left
        raise
    except Exception as error:
        kinds = [kind.__name__ for kind in type(error).__mro__]
        what, *fixes = _FIX.split(masked(" ".join(plain(str(error)).split())), maxsplit=1)
        text, fix = _cut(what, MOST) or kinds[0], _cut("".join(fixes), MOST_FIX)
        if kinds[0] in _USERS:
            raise InputError(where, text, remedy=fix) from error
        known = next((_REMEDIES[kind] for kind in kinds if kind in _REMEDIES), "")
        if kinds[0] in _FAULTS:
            text = text if kinds[0] == "Exception" else f"{kinds[0]}: {text}"
            known = known or "a fault of SkyPilot's: sky api status -a names the request, sky api logs ID shows it"
        remedy = "; ".join(part for part in (known, fix) if part)
        raise InfraError(f"SkyPilot: {text}{f' ({remedy})' if remedy else ''}") from error


def masked(text: str) -> str:
    """Returns the text without passwords in URLs, such as a team's server has."""
    return _PASSWORD.sub(r"\1:***@", text)


def _cut(text: str, most: int) -> str:
    text = _HINT.split(text)[0].strip().rstrip(".")
    return text if len(text) <= most else f"{text[:most].rstrip()} …"


@dataclass(frozen=True)
class ProvisionedCluster:
    """What SkyPilot's provisioner needs to know of a cluster: its name there, ``provider`` and its ``config``."""

    name: str
    provider: str
    config: Mapping[str, Any]
    nodes: int = 1
    workspace: str = "default"


def sdk() -> Any:
    """Returns the module ``sky``; its import costs seconds of CPU. Raises InfraError if it is not installed."""
    try:
        with redirect_stdout(sys.stderr):  # its loggers keep the stream that they find; stdout is for results
            import sky
    except ImportError as error:
        raise InfraError(f"SkyPilot cannot be imported: {error} (make setup)") from error
    return sky


def module(name: str) -> Any:
    """Returns a module of SkyPilot's, such as ``server.common``."""
    return import_module(f"{sdk().__name__}.{name}")


@translated()
def ask(request_id: Any) -> Any:
    """Returns the result of a request that a client function made. Raises InfraError or InputError."""
    return sdk().get(request_id)


@translated()
def call(ask_for: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Calls one of the client's functions and returns the result of its request."""
    return sdk().get(ask_for(*arguments, **options))


def task(config: Mapping[str, Any], where: str = "task") -> Any:
    """Returns a ``sky.Task``. Raises InputError, naming ``where``, if SkyPilot cannot use it."""
    with translated(where):
        return sdk().Task.from_yaml_config(json.loads(json.dumps(config)))  # a copy: SkyPilot changes its argument


@translated()
def launch(job: Any, name: str) -> Any:
    """Submits a task as a managed job; returns the request, whose result is (ids, handle)."""
    return sdk().jobs.launch(job, name=name)


@translated()
def end_launches(name: str) -> bool:
    """Cancels the pending requests that submit managed jobs of this name; returns whether there was one.

    A request goes on when its client stops waiting. A cancelled one may have put its job into the queue before.
    """
    client = sdk()
    launches = [one for one in client.api_status() if one.name == "sky.jobs.launch"]
    # Another user's request has no body.
    pending = [one.request_id for one in launches if (json.loads(one.request_body) or {}).get("name") == name]
    if pending:
        client.get(client.api_cancel(pending, silent=True))
    return bool(pending)


@translated()
def check_feasible(job: Any) -> None:
    """Raises InfraError if no enabled cloud has what the task asks for."""
    client = sdk()
    with client.Dag() as dag:
        dag.add(job)
    client.get(client.optimize(dag))


def managed_jobs(fields: Sequence[str], everyone: bool, name: str = "", ids: Sequence[int] = ()) -> list[Any]:
    """Returns ManagedJobRecords: all, those whose name holds ``name``, or those with these ids."""
    all_users = everyone or bool(name or ids)
    options = {"all_users": all_users, "fields": list(fields), "name_match": name or None, "job_ids": list(ids) or None}
    return list(call(sdk().jobs.queue_v2, refresh=False, **options)[0])


def events(job_id: int) -> list[tuple[float, str, str]]:
    """Returns (epoch seconds, status, reason) of a managed job's changes, oldest first."""
    found = []
    for row in _post("/jobs/events", "GetJobEventsBody", job_id=job_id, limit=None):
        status = str(getattr(row["new_status"], "value", row["new_status"]))
        found.append((_epoch(row["timestamp"]), status, row.get("reason") or ""))
    return sorted(found)


def _epoch(value: Any) -> float:
    if isinstance(value, (int, float)):
        return float(value)
    return (value if isinstance(value, datetime) else datetime.fromisoformat(str(value))).timestamp()


def cost_rows(names: Sequence[str]) -> list[dict[str, Any]]:
    """Returns the rows of ``cost_report`` for clusters of these names, however old."""
    return list(_post("/cost_report", "CostReportBody", days=3650, cluster_names=list(names)))


@translated()
def _post(path: str, body: str, **fields: Any) -> Any:
    """Returns the result of a request for which the client has no function with these fields."""
    common = module("server.common")
    payload = getattr(module("server.requests.payloads"), body)(**fields)
    content = json.loads(payload.model_dump_json())
    return sdk().get(common.get_request_id(common.make_authenticated_request("POST", path, json=content)))


@translated()
def excluded_files(folder: str) -> list[str]:
    """Returns the files and folders of a folder that are not sent, as .gitignore or .skyignore says; relative paths."""
    return list(module("data.storage_utils").get_excluded_files(folder))


@translated()
def enabled_clouds() -> list[str]:
    """Returns the clouds that ``sky check`` enabled, in lower case."""
    return [str(name).lower() for name in sdk().get(module("client.sdk").enabled_clouds())]


@translated()
def check_answers() -> None:
    """Raises InfraError if no API server answers; every other request starts one on this machine."""
    status = module("server.common").get_api_server_status().status.value
    if status != "healthy":
        raise InfraError(f"SkyPilot's API server does not answer: {status} (sky api login for a team's server)")


@translated()
def server() -> ApiServer:
    """Returns the API server; most facts are known only of a local one."""
    common = module("server.common")
    common.check_server_healthy()  # as every other request does; api_info alone says less about the failure
    version, url = str(sdk().api_info().version), common.get_server_url()
    found = ApiServer(url=masked(url), version=version, is_local=common.is_api_server_local(url))
    if not found.is_local:
        return found

    import psutil  # here: for `check` alone

    count, memory_mb = find_controllers(Path.home())
    return replace(
        found,
        consolidation=module("utils.controller_utils").is_jobs_consolidation_mode(),
        controllers=count,
        controllers_mb=memory_mb,
        free_mb=psutil.virtual_memory().available / _MB,
        cpus=module("utils.common_utils").get_cpu_count(),
    )


@translated()
def machine(cluster: str) -> ProvisionedCluster | None:
    """Returns a cluster's record, or None if this machine's SkyPilot has none, as with a remote API server."""
    state = module("global_user_state")
    is_local = module("server.common").is_api_server_local()
    record = state.get_cluster_from_name(cluster) if is_local else None
    if record is None:
        return None
    handle = record["handle"]
    return ProvisionedCluster(
        name=handle.cluster_name_on_cloud,
        provider=repr(handle.launched_resources.cloud),
        config=state.get_cluster_yaml_dict(handle.cluster_yaml)["provider"],
        nodes=handle.launched_nodes,
        workspace=record["workspace"],
    )


@translated()
def terminate(machine: ProvisionedCluster) -> None:
    """Terminates all instances of a cluster. SkyPilot notices at its next poll."""
    with module("skypilot_config").local_active_workspace_ctx(machine.workspace):
        module("provision").terminate_instances(machine.provider, machine.name, dict(machine.config))


@translated()
def cloud(name: str) -> Any:
    """Returns SkyPilot's object for a cloud."""
    return module("utils.registry").CLOUD_REGISTRY.from_str(name)


def log_pieces(job_id: int, follow: bool, controller: bool = False) -> Iterator[str | None]:
    """Yields the text of a managed job's log, or of its controller's log, as it comes."""
    with translated():
        pieces = sdk().jobs.tail_logs(job_id=job_id, follow=follow, controller=controller, preload_content=False)
    while True:
        with translated():
            try:
                piece = next(pieces)
            except StopIteration:
                return
        yield piece


_COLOUR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
# (NAME, pid=123) text, and (worker1, rank=1, pid=123, ip=10.0.0.2) text
_PREFIX = re.compile(r"^\((?P<name>[^()]*?)(?:, rank=(?P<rank>\d+))?, pid=\d+(?:, ip=[^)]*)?\) ?")
_OF_SKYPILOT = re.compile(
    r"^(?:[├└]── |↳|✓ |✗ |⚙︎|[⠀-⣿]|Hint: |(?:Managed )?[Jj]ob finished|Waiting for task |<sky-payload|"
    r"The job cluster is preempted|Start streaming logs|ERROR: Job \d+ failed with return code)"
)
# SkyPilot's text after a last line that the program did not end.
_GLUED = re.compile(r"[✓✗] Job finished \(status: [A-Z_]+\)\.$")
_ANSI_CODES = re.compile(r"^ERROR: Job \d+ failed with return code list: *\[([\d, ]+)\]", re.MULTILINE)
_BEGIN, _END = re.compile(r"^== Logs of the user job \(ID: \d+\) ==$"), re.compile(r"^== End of logs \(ID: \d+\) ==$")


def plain(text: str) -> str:
    """Returns the text without SkyPilot's colours."""
    return _COLOUR.sub("", text)


def lines_of(pieces: Iterable[str | None]) -> Iterator[str]:
    """Yields whole lines from a stream of text, also an unfinished last one. SkyPilot's spinner sends None."""
    lines = LogLines()
    for piece in pieces:
        yield from lines.add(piece or "")
    yield from lines.last()


def exit_code(log: str) -> int | None:
    """Returns the exit code of a failed job's program, or None if the log does not say it."""
    found = _ANSI_CODES.search(plain(log))
    return first_failure(int(code) for code in found[1].split(",")) if found else None


def first_failure(codes: Iterable[int]) -> int:
    """Returns, of several machines' exit codes, the first of a machine that failed by itself; 0 if none failed.

    When one machine's process fails, SkyPilot kills the others, which exit with 137.
    """
    failed = [code for code in codes if code]
    return next((code for code in failed if code != 137), failed[0] if failed else 0)


def starts_log(line: str) -> bool:
    """Returns whether a machine's log begins with this line; one stream may have several machines' logs."""
    return plain(line).startswith("├── Waiting for task resources")


def program_line(line: str) -> str | None:
    """Returns a line as the program wrote it, or None for SkyPilot's own lines. Ranks above 0 stay as a prefix."""
    line = plain(line).rstrip("\r")
    found = _PREFIX.match(line)
    if not found:
        return None if _OF_SKYPILOT.match(line) or not line.strip() else line
    text = _GLUED.sub("", line[found.end() :])
    rank = found["rank"]
    return f"[{rank}] {text}" if rank and rank != "0" else text


def attempts_in(controller: Iterable[str]) -> list[list[str]]:
    """Returns what the program printed in each attempt that ended by itself, from the controller's log.

    SkyPilot keeps the job's log of its last machine only, but its controller copies the log before it releases a
    machine. A machine that vanished left nothing to copy.
    """
    found: list[list[str]] = []
    is_inside = False
    for line in controller:
        bare = plain(line).strip()
        if _BEGIN.match(bare):
            found.append([])
            is_inside = True
        elif _END.match(bare):
            is_inside = False
        elif is_inside and (text := program_line(line)) is not None:
            found[-1].append(text)
    return found


PIDS = ".sky/job_controller_pid"  # a line each, ``PID,STARTED_AT``; also of controllers that have gone
_MB = 2**20


def find_controllers(home: Path) -> tuple[int, float]:
    """Returns how many controllers run, and the memory that they and their children hold, in MB.

    A process that reuses the number of a former controller does not count.
    """
    try:
        lines = (home / PIDS).read_text().split()
    except OSError:
        return 0, 0.0
    held = [mb for line in lines if (mb := _memory_mb(*line.partition(",")[::2])) is not None]
    return len(held), sum(held)


def _memory_mb(pid: str, started_at: str) -> float | None:
    import psutil  # here: for `check` alone

    try:
        process = psutil.Process(int(pid))
        if started_at and abs(process.create_time() - float(started_at)) > 1:
            return None
        family = [process, *process.children(recursive=True)]
        return sum(one.memory_info().rss for one in family) / _MB
    except (ValueError, psutil.Error):
        return None
