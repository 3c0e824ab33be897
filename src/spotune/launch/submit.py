"""A plan that was agreed to becomes a run: its record in the bucket, its job in an engine, or nothing at all.

An id that is taken already: the same run is left alone, or goes on. With another config, data or model it goes on as
a revision, if it stands still and what changed may change, by itself or because it was asked for.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from spotune.contracts.change import FLAG, Change, admit, compare
from spotune.contracts.envrule import FLAG as FLAG_ENV
from spotune.contracts.errors import InfraError, InputError, Taken, Unsettled
from spotune.contracts.keys import Keys
from spotune.contracts.records import RunRecord
from spotune.contracts.revisions import check_length, record_history, refused_versions, revised, write_revision
from spotune.launch.actions import go_on
from spotune.launch.code import keep_code
from spotune.launch.infra import ACTIVE, Infra, JobStatus
from spotune.launch.origins import from_run, revision_of, unseen_by
from spotune.launch.plan import Plan
from spotune.launch.status import find_run
from spotune.launch.workspace import Workspace

Outcome = Literal["submitted", "active", "succeeded", "resumed", "cleared"]
OTHER_NAME = "choose another --name"


@dataclass(frozen=True)
class Submitted:
    """What has become of a plan.

    ``submitted``: a new run. ``active``, ``succeeded``: the same run is under way, or finished, already. ``resumed``:
    it goes on with a change. ``cleared``: the same, but it has to be started again where it was.
    """

    outcome: Outcome
    change: Change = field(default_factory=Change)


@dataclass(frozen=True)
class Existing:
    """The run that has a plan's id: ``status`` None when it was never handed to an engine.

    ``history``: its record as submitted and all revisions.
    """

    status: JobStatus | None
    change: Change
    revision: RunRecord
    history: tuple[RunRecord, ...] = ()


def submit(plan: Plan, workspace: Workspace) -> Submitted:
    """Submits the plan, or lets the run that has its id already go on as planned.

    Raises InputError when that run is another one, is under way as another one, or has ended and nothing changed.
    """
    store, keys = workspace.store(plan.bucket), Keys(plan.run_id)
    is_new = store.create(keys.run, plan.record.to_bytes())
    if is_new and _enqueue(plan, workspace, [keys.run], plan.record.created_at, is_new=True):
        return Submitted("submitted")
    found = existing(plan, workspace)
    if found and found.status is None:
        # run.json without a job: the launcher died in between, or is not that far yet. It is the same run, so this one
        # goes on from there.
        written = [keys.revision(found.revision.revision)] if found.change else []
        if written:
            write_revision(store, keys, found.revision)
        if _enqueue(plan, workspace, written, found.revision.created_at, is_new=False):
            store.create(keys.run, plan.record.to_bytes())  # whoever began it may have taken it back meanwhile
            return Submitted("submitted", found.change)
        found = existing(plan, workspace)
    if found is None or found.status is None:
        raise InputError("--name", f"{plan.run_id} was taken and given up just now", remedy="try again")
    if not found.change:
        return Submitted("succeeded" if found.status.state == "SUCCEEDED" else "active")
    return Submitted("resumed" if go_on(workspace, found.status, found.revision) else "cleared", found.change)


def existing(plan: Plan, workspace: Workspace) -> Existing | None:
    """The run that has the plan's id, None when there is none; raises what ``submit`` would raise. Writes nothing."""
    store, keys = workspace.store(plan.bucket), Keys(plan.run_id)
    history = record_history(store, keys)
    if not history:
        return None
    record = history[-1]
    if more := sorted(set(plan.record.allowed_env) - set(record.allowed_env)):
        what = f"{plan.run_id} was submitted without {', '.join(more)}, and its machines go by that"
        raise InputError(FLAG_ENV, what, remedy=OTHER_NAME)
    revision = revised(record, plan.record, plan.record.user, plan.record.created_at)
    if record.kind != plan.record.kind:
        what = "a dev run" if record.kind == "dev" else "a production run"
        raise InputError("--name", f"{plan.run_id} is {what}", remedy=OTHER_NAME)
    change = compare(record, revision)
    if plan.allow_config_change:
        change = replace(change, versions=refused_versions(store, keys))
    # Every engine is asked: it may have been given to another one than this plan's.
    is_started = any(engine.jobs([plan.run_id]) for engine in workspace.engines()) or store.folders(keys.attempts)
    status = find_run(workspace, plan.run_id) if is_started else None
    if not change:
        if status and status.state not in (*ACTIVE, "SUCCEEDED"):
            raise InputError(plan.run_id, f"has ended {status.state}", remedy=f"spotune resume {plan.run_id}")
    else:
        _check_open(plan, record, status, change)
        remedy = f"{FLAG} to go on with it, or {OTHER_NAME}"
        allowed = admit(change, plan.allow_config_change, "--name", f"{plan.run_id} exists with", remedy)
        revision = replace(revision, allowed=allowed)
        check_length(store, keys, revision)
    return Existing(status, change, revision, tuple(history))


def with_existing(plan: Plan, found: Existing | None) -> Plan:
    """The plan as it is shown where a run has its id already: with whose that is, and the revision in force."""
    if found is None:
        return plan
    user, record = plan.record.user, found.history[-1]
    taken = [from_run(record, "its checkpoints")] if record.user != user else []
    taken += revision_of(user, found.history)
    is_new = not found.change and found.status is not None  # nothing goes on
    unseen = plan.unseen if is_new else (*plan.unseen, *unseen_by(user, found.history))
    return replace(plan, takes=(*taken, *plan.takes), unseen=tuple(dict.fromkeys(unseen)))


def _check_open(plan: Plan, record: RunRecord, status: JobStatus | None, change: Change) -> None:
    """Raises InputError for a run that nothing may be changed of: finished, under way, or interactive."""
    what = f"with {change.as_differing()}"
    if status and status.state == "SUCCEEDED":
        raise InputError("--name", f"{plan.run_id} is finished, {what}", remedy=OTHER_NAME)
    if status and status.state in ACTIVE:
        remedy = f"spotune cancel {plan.run_id} first, or {OTHER_NAME}"
        raise InputError("--name", f"{plan.run_id} is under way {what}", remedy=remedy)
    if record.kind == "dev":
        raise InputError("--name", f"{plan.run_id} exists {what}", remedy=OTHER_NAME)


def _enqueue(plan: Plan, workspace: Workspace, written: list[str], since: float, is_new: bool) -> bool:
    """Writes the code's state and hands the job over; whatever stops it, nothing that it wrote stays behind.

    Unless the run has a job all the same, or nobody can tell: then it stays a run. Returns False where another
    submission of the same run was faster: the record and the code are that one's from then on, whoever wrote them.

    Args:
        written: the keys that this submission has written already.
        since: when the record that is there was made, epoch seconds.
        is_new: whether that is this submission's; else the code is that of whoever began it, and stays.
    """
    store, infra, keys = workspace.store(plan.bucket), workspace.infra(plan.infra), Keys(plan.run_id)
    code: list[str] = []
    try:
        if is_new or not store.keys(keys.code):
            keep_code(plan.code, store, keys.code, code)
        infra.submit(plan.submission)
    except Unsettled:
        raise
    except BaseException as error:
        has_job = _has_job(plan, infra, since)
        if has_job is False:
            store.delete([*written, *code])
        elif not is_new:
            store.delete(written)  # its own revision, which would be in force
        if has_job and isinstance(error, Taken):
            return False
        raise
    return True


def _has_job(plan: Plan, infra: Infra, since: float) -> bool | None:
    """Whether the record that is there has a job, not one before it, or one elsewhere; None: nobody can tell."""
    try:
        jobs = infra.jobs([plan.run_id])
    except InfraError:
        return None
    return any(job.bucket == plan.bucket and job.submitted_at >= since for job in jobs)
