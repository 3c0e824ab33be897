"""The SkyPilot task of a run, and what Slurm adds to it."""

import re
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spotune.core import errors
from spotune.core.environment import BUCKET
from spotune.core.errors import InfraError, InputError
from spotune.launch.engine import ANY, Submission, cloud_of
from spotune.launch.plan import check_project, inside
from spotune.launch.settings import SlurmSettings
from spotune.launch.skypilot import client
from spotune.launch.skypilot.client import server_problems
from spotune.launch.skypilot.jobs import MARK
from spotune.launch.task import LISTS, each_of, override

CONFIG = ".slurm/config"
_SPOT = re.compile(r"spot|preempt", re.IGNORECASE)  # in a partition's name, where Slurm does not say
_PLACES = ("infra", "cloud", "region", "zone")


def check_sent(
    config: Mapping[str, Any],
    files: Sequence[Mapping[str, Any]],
    where: str,
    folder: Path,
    task: Mapping[str, Any],
    infra: str,
) -> None:
    """Raises InputError for a folder that cannot set up a machine, and for local data or a local model that SkyPilot
    does not send: a machine gets the run's folder without what git ignores. The config goes by the bucket.

    Nothing is checked if the task's ``workdir`` is a git reference. Paths below its ``file_mounts`` exist on the
    machine. ``files`` is the data, as ``fingerprint.data_files`` returns it; ``where`` is the config's name.
    """
    if not isinstance(task.get("workdir"), str):
        return
    check_project(folder, task)
    mounts = [Path(target) for target in task.get("file_mounts") or {} if target.startswith("/")]
    excluded = client.excluded_files(str(folder))
    for key, path in _local(config, files):
        if path.is_absolute():
            # As a rule, a Slurm cluster's nodes share file systems with its login nodes.
            if cloud_of(infra) == "slurm" or any(path.is_relative_to(mount) for mount in mounts):
                continue
            what = f"{path} is a path of this machine"
            raise InputError(where, what, key=key, remedy=f"a path below {folder}, relative to it, or a bucket's URL")
        sent = inside(folder / path, folder)
        if sent is None:
            what = f"{path} is not below {folder}, and a machine gets only that folder"
            raise InputError(where, what, key=key, remedy="copy it there, or a bucket's URL")
        if any(sent.is_relative_to(one) for one in excluded):
            what = f"{path} is ignored by git, so that SkyPilot does not send it"
            raise InputError(where, what, key=key, remedy="a .skyignore of your own, or a bucket's URL")


def _local(config: Mapping[str, Any], files: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Path]]:
    """Yields (key, path) of what the run reads from a disk, as the config names it."""
    for key in ("model_name_or_path", "chat_template_path"):
        if config.get(key) and (path := Path(str(config[key])).expanduser()).exists():
            yield key, path
    for file in files:
        if "://" not in (name := str(file["url"]).removeprefix("file://")):
            yield "data", Path(name)


def task_config(submission: Submission, nice: int) -> dict[str, Any]:
    """Returns SkyPilot's task of a submission. ``nice``: of a job of priority 0 in a Slurm queue."""
    task = {**submission.task, "name": submission.run_id}
    if isinstance(task.get("workdir"), str):  # else none, or a git reference that the machine checks out itself
        task["workdir"] = submission.workdir
    resources = task.get("resources") or {}
    if not any(one.get(name) for one in each_of(resources) for name in _PLACES):  # the plan has not placed it
        resources = placed(resources, submission.infra)
    task["resources"] = recovered(resources)
    if cloud_of(submission.infra) in ("slurm", ANY):
        config = task.get("config") or {}
        slurm = config.get("slurm") or {}
        options = {"nice": max(0, nice - submission.priority), **(slurm.get("sbatch_options") or {})}
        task["config"] = {**config, "slurm": {**slurm, "sbatch_options": options}}
    task = with_secrets(task, submission.secrets)
    marks = {name: getattr(submission, name) for name in ("user", "infra", "priority")}
    marks["bucket"] = (task.get("envs") or {}).get(BUCKET, "")
    task["_metadata"] = {**(task.get("_metadata") or {}), MARK: marks}
    return task


def with_secrets(task: Mapping[str, Any], values: Mapping[str, str]) -> dict[str, Any]:
    """Returns the task with these secrets added to its own. SkyPilot refuses a secret without a value."""
    both = {**(task.get("secrets") or {}), **values}
    rest = {name: value for name, value in task.items() if name != "secrets"}
    return {**rest, "secrets": both} if both else rest


def placed(resources: Mapping[str, Any], infra: str, partitions: Sequence[str] = ()) -> dict[str, Any]:
    """Returns ``resources`` at the place that was asked for, on Slurm at any of ``partitions`` if there are some.

    On Slurm ``use_spot`` is removed, since SkyPilot refuses it there: the partition makes a job preemptible.
    """
    cloud = cloud_of(infra)
    if cloud == ANY:
        return dict(resources)
    wanted = override(resources, {}, without=(*_PLACES, "use_spot") if cloud == "slurm" else _PLACES)
    if len(partitions) > 1:
        kind = "ordered" if wanted.get("ordered") else "any_of"
        wanted[kind] = [{**one, "infra": place} for one in wanted.get(kind) or [{}] for place in partitions]
    else:
        wanted["infra"] = partitions[0] if partitions else infra
    return wanted


def recovered(resources: Mapping[str, Any]) -> dict[str, Any]:
    """Returns ``resources`` with exit code 75 added to the codes that get a job another machine."""
    for name in LISTS:
        if isinstance(resources.get(name), list):
            listed = [
                recovered(one) if isinstance(one, Mapping) and "job_recovery" in one else one for one in resources[name]
            ]
            resources = {**resources, name: listed}
    given = resources.get("job_recovery") or {}
    recovery = dict(given) if isinstance(given, Mapping) else {"strategy": given}
    codes = recovery.get("recover_on_exit_codes") or []
    codes = [codes] if isinstance(codes, int) else list(codes)
    if errors.PREEMPTED not in codes:
        codes.append(errors.PREEMPTED)
    return {**resources, "job_recovery": {**recovery, "recover_on_exit_codes": codes}}


def check_submission(submission: Submission) -> None:
    """Raises InputError for a submission that only the local engine can run."""
    if submission.interactive:
        raise InputError("--infra", f"{submission.infra}: a dev run is interactive", remedy="spotune dev")
    if submission.preemptions:
        raise InputError("--preemptions", f"{submission.infra} takes machines away by itself", remedy="--infra local")


# Slurm's partitions and signals, which SkyPilot does not offer: over the login node, by ssh with the hosts of
# ``~/.slurm/config``, as SkyPilot does it.


@dataclass(frozen=True)
class Partition:
    """A Slurm partition; ``preemptible``: other partitions' jobs preempt its jobs."""

    name: str
    preemptible: bool


def clusters(environ: Mapping[str, str]) -> list[str]:
    """Returns the clusters whose login node is known here."""
    try:
        hosts = (_home(environ) / CONFIG).read_text()
    except OSError:
        return []
    named = [name for line in re.findall(r"(?mi)^\s*Host\s+(.+)$", hosts) for name in line.split()]
    return [name for name in named if not set(name) & set("*?!")]


def parse_partitions(text: str) -> list[Partition]:
    """Reads the output of ``scontrol --oneliner show partition``.

    A partition is preemptible if it has a PreemptMode and another partition has a higher PriorityTier. If all have the
    same tier (preemption by QOS, or none), the partition's name decides.
    """
    found = []
    for line in text.splitlines():
        facts = dict(pair.partition("=")[::2] for pair in line.split() if "=" in pair)
        if name := facts.get("PartitionName"):
            tier = facts.get("PriorityTier", "1")
            found.append((name, facts.get("PreemptMode", "OFF").upper(), int(tier) if tier.isdigit() else 1))
    highest = max((tier for _, _, tier in found), default=1)
    is_tiered = any(tier < highest for _, _, tier in found)
    return [
        Partition(name, (mode != "OFF" and tier < highest) if is_tiered else bool(_SPOT.search(name)))
        for name, mode, tier in found
    ]


def known_partitions(cluster: str, settings: SlurmSettings, environ: Mapping[str, str]) -> list[Partition]:
    """Returns the cluster's partitions: Slurm's own list if its login node answers, corrected by the settings."""
    found: list[Partition] = []
    if cluster in clusters(environ):
        with suppress(InfraError):  # SkyPilot's server may reach it all the same
            found = parse_partitions(on_login(cluster, "scontrol --oneliner show partition", environ))
    if settings.preemptible is None:
        return found
    ours = [name.partition("/")[2] for name in settings.preemptible if name.partition("/")[0] == cluster]
    found = [replace(one, preemptible=one.name in ours) for one in found]
    return [*found, *(Partition(name, True) for name in ours if name not in [one.name for one in found])]


def partitions_of(infra: str, settings: SlurmSettings, environ: Mapping[str, str]) -> dict[str, list[Partition]]:
    """Returns the partitions in ``slurm[/CLUSTER[/PARTITION]]`` by cluster, always with the named one."""
    cluster, partition = (*infra.split("/")[1:], "", "")[:2]
    known = {name: known_partitions(name, settings, environ) for name in ([cluster] if cluster else clusters(environ))}
    if partition and partition not in [one.name for one in known[cluster]]:
        known[cluster].append(Partition(partition, bool(_SPOT.search(partition))))
    return known


def preemptible_partitions(infra: str, settings: SlurmSettings, environ: Mapping[str, str]) -> list[str]:
    """Returns the partitions in ``infra`` that count as spot, ``CLUSTER/PARTITION``; none outside Slurm."""
    if cloud_of(infra) != "slurm":
        return []
    known = partitions_of(infra, settings, environ)
    return [f"{name}/{one.name}" for name, partitions in known.items() for one in partitions if one.preemptible]


def on_login(cluster: str, command: str, environ: Mapping[str, str]) -> str:
    """Returns the output of a command on the login node. Raises InfraError, with its stderr, if it fails."""
    config = _home(environ) / CONFIG
    ssh = ["ssh", "-F", str(config), "-o", "BatchMode=yes", "-o", "ConnectTimeout=15", cluster, command]
    try:
        done = subprocess.run(
            ssh, capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL, env=environ
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InfraError(f"slurm/{cluster}: the login node does not answer: {error}") from error
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise InfraError(f"slurm/{cluster}: {said} (is {cluster} in ~/{CONFIG}?)")
    return done.stdout


def taking(name: str, notice_s: float) -> str:
    """Returns the login node's command that takes the allocation called ``name`` away; prints ``taken`` or ``none``.

    With notice, the steps get SIGURG at once, the signal by which a task on Slurm asks to be warned. A process on the
    login node ends the job when the time is over, without this process or machine.

    Without notice it kills the job and releases the allocation at once. If the steps are dead while the allocation
    exists, SkyPilot's poll may find a failed job on a machine that is up, and give the job up for good. Slurm ends any
    job with a SIGTERM first, so that a step may hear of it seconds before. Killing the steps one by one avoids that,
    but was measured to end a job FAILED.
    """
    jobs = f"jobs=$(echo $(squeue --me --noheader --name={shlex.quote(name)} --states=RUNNING --format=%A)) || exit"
    jobs += '; [ -n "$jobs" ] || { echo none; exit; }'
    if notice_s:
        later = f'nohup setsid sh -c "sleep {notice_s:g}; scancel $jobs" < /dev/null > /dev/null 2>&1 &'
        return f"{jobs}; scancel --signal=URG $jobs; {later} echo taken"
    return f"{jobs}; scancel --full --signal=KILL $jobs; scancel $jobs; echo taken"


def _home(environ: Mapping[str, str]) -> Path:
    return Path(environ.get("HOME") or "~").expanduser()


def survey_infra(infra: str, settings: SlurmSettings, environ: Mapping[str, str]) -> dict[str, Any]:
    """Returns facts about SkyPilot for ``check --infra NAME``; ``problems`` make costs inexact or launches slow.

    Raises InfraError if the API server does not answer.
    """
    cloud = cloud_of(infra)
    server = client.server()
    clouds = client.enabled_clouds()
    found: dict[str, Any] = {
        "infra": infra,
        "api_server": f"{server.url} ({'local' if server.is_local else 'remote'}, SkyPilot {server.version})",
        "enabled": clouds,
        "consolidation": {True: "on", False: "off", None: "not known"}[server.consolidation],
        "controllers": server.controllers if server.controllers is not None else "not known",
    }
    problems = server_problems(server)
    if cloud != ANY and cloud not in clouds:
        problems.append(f"{cloud} is not enabled: sky check {cloud} says what is missing")
    if cloud == "slurm":
        cluster, reached = infra.partition("/")[2].split("/")[0], clusters(environ)
        found["partitions"] = []
        for name in [cluster] if cluster else reached:
            for one in known_partitions(name, settings, environ):
                found["partitions"].append(f"{name}/{one.name}{' (preemptible)' if one.preemptible else ''}")
            if name not in reached:
                problems.append(f"{name} is not in ~/{CONFIG} here: spotune preempt cannot reach it")
                continue
            try:
                on_login(name, "squeue --version", environ)
            except InfraError as error:
                problems.append(str(error))
    return {**found, "problems": problems}
