"""A submission as the task that SkyPilot gets, and which local files its machines get."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from spotune.core import exits
from spotune.core.environment import BUCKET
from spotune.core.errors import InputError
from spotune.launch.engine import ANY, Submission, cloud_of
from spotune.launch.plan import check_project, inside
from spotune.launch.skypilot import client
from spotune.launch.skypilot.jobs import MARK
from spotune.launch.task import LISTS, each_of, override

# What a machine of SkyPilot's gets of this one's files: the folder of the run, but for what git ignores.

_IGNORED = "is ignored by git, so that SkyPilot does not send it"


def check_sent(
    config: Mapping[str, Any],
    files: Sequence[Mapping[str, Any]],
    where: str,
    folder: Path,
    task: Mapping[str, Any],
    infra: str,
) -> None:
    """Raises InputError for a folder that no machine could be set up from, and for data or a model that lies here and
    would not be there. The config goes by the bucket.

    Args:
        files: the data, as ``fingerprint.data_files`` has it.
        where: the config file, as it was named.
        folder: what is sent, where the task's ``workdir`` is a folder; into a git reference nobody looks.
        task: what its ``file_mounts`` bring is there.
    """
    if not isinstance(task.get("workdir"), str):
        return
    check_project(folder, task)
    mounts = [Path(target) for target in task.get("file_mounts") or {} if target.startswith("/")]
    excluded = client.excluded_files(str(folder))
    for key, path in _local(config, files):
        if path.is_absolute():
            # A cluster's nodes share file systems with where their users log in, as a rule.
            if cloud_of(infra) == "slurm" or any(path.is_relative_to(mount) for mount in mounts):
                continue
            what = f"{path} is a path of this machine"
            raise InputError(where, what, key=key, remedy=f"a path below {folder}, relative to it, or a bucket's URL")
        sent = inside(folder / path, folder)
        if sent is None:
            what = f"{path} is not below {folder}, which is what a machine gets"
            raise InputError(where, what, key=key, remedy="copy it there, or a bucket's URL")
        if any(sent.is_relative_to(one) for one in excluded):
            raise InputError(where, f"{path} {_IGNORED}", key=key, remedy="a .skyignore of your own, or a bucket's URL")


def _local(config: Mapping[str, Any], files: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Path]]:
    """(key, path) of what the run reads from a disk, as the config names it."""
    for key in ("model_name_or_path", "chat_template_path"):
        if config.get(key) and (path := Path(str(config[key])).expanduser()).exists():
            yield key, path
    for file in files:
        if "://" not in (name := str(file["url"]).removeprefix("file://")):
            yield "data", Path(name)


# A submission as the task that SkyPilot gets: its own YAML as data, with the place, the secrets and our mark.

_PLACES = ("infra", "cloud", "region", "zone")


def task_config(submission: Submission, nice: int) -> dict[str, Any]:
    """What ``sky.Task.from_yaml_config`` takes; ``nice`` is that of a job of priority 0 in a Slurm queue."""
    task = {**submission.task, "name": submission.run_id}
    if isinstance(task.get("workdir"), str):  # else none, or a git reference that the machine checks out itself
        task["workdir"] = submission.workdir
    resources = task.get("resources") or {}  # as the plan has placed them
    task["resources"] = recovered(resources if is_placed(resources) else placed(resources, submission.infra))
    if cloud_of(submission.infra) in ("slurm", ANY):
        task["config"] = queued(task.get("config") or {}, max(0, nice - submission.priority))
    task = with_secrets(task, submission.secrets)
    envs = task.get("envs") or {}
    marks = {
        "user": submission.user,
        "infra": submission.infra,
        "bucket": envs.get(BUCKET, ""),
        "priority": submission.priority,
    }
    task["_metadata"] = {**(task.get("_metadata") or {}), MARK: marks}
    return task


def with_secrets(task: Mapping[str, Any], values: Mapping[str, str]) -> dict[str, Any]:
    """The task with these beside its own ``secrets``; one that has no value is SkyPilot's to refuse."""
    both = {**(task.get("secrets") or {}), **values}
    rest = {name: value for name, value in task.items() if name != "secrets"}
    return {**rest, "secrets": both} if both else rest


def placed(resources: Mapping[str, Any], infra: str, partitions: Sequence[str] = ()) -> dict[str, Any]:
    """``resources`` at the place that was asked for.

    Slurm has no spot machines, and SkyPilot refuses the word: there the partition is what makes a job preemptible.

    Args:
        partitions: where on Slurm it may run, ``slurm/CLUSTER/PARTITION``; empty: wherever SkyPilot likes.
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
    """``resources`` of a job that is given another machine when it exits with 75, whatever else its task says."""
    for name in LISTS:
        if isinstance(resources.get(name), list):
            resources = {**resources, name: [_recovered_if_said(one) for one in resources[name]]}
    given = resources.get("job_recovery") or {}
    recovery = dict(given) if isinstance(given, Mapping) else {"strategy": given}
    codes = recovery.get("recover_on_exit_codes") or []
    codes = [codes] if isinstance(codes, int) else list(codes)
    if exits.PREEMPTED not in codes:
        codes.append(exits.PREEMPTED)
    return {**resources, "job_recovery": {**recovery, "recover_on_exit_codes": codes}}


def queued(config: Mapping[str, Any], nice: int) -> dict[str, Any]:
    """A task's ``config`` with its place in Slurm's queue, unless it has one: SkyPilot's priority ends before it."""
    slurm = config.get("slurm") or {}
    options = slurm.get("sbatch_options") or {}
    return {**config, "slurm": {**slurm, "sbatch_options": {"nice": nice, **options}}}


def is_placed(resources: Mapping[str, Any]) -> bool:
    return any(one.get(name) for one in each_of(resources) for name in _PLACES)


def _recovered_if_said(one: Any) -> Any:
    return recovered(one) if isinstance(one, Mapping) and "job_recovery" in one else one


def check_submission(submission: Submission) -> None:
    """Raises InputError for what only this machine can do."""
    if submission.interactive:
        raise InputError("--infra", f"{submission.infra}: a dev run is interactive", remedy="spotune dev")
    if submission.preemptions:
        raise InputError("--preemptions", f"{submission.infra} takes machines away by itself", remedy="--infra local")
