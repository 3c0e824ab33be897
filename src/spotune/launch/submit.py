"""Submit, revise, cancel, resume and preempt a run: records in the bucket first, then the engine."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from spotune.core.config import overlay
from spotune.core.config_keys import FLAG as FLAG_ENV
from spotune.core.errors import FAILED, InfraError, InputError, SpotuneError, StoreError, Taken, Unsettled
from spotune.core.fingerprint import data_files, data_sha256, model_files, model_sha256
from spotune.core.keys import Keys
from spotune.core.records import Mark, RunRecord, fingerprint, read_mark
from spotune.core.revisions import (
    FLAG,
    Change,
    admit,
    check_length,
    compare,
    record_history,
    record_in_force,
    refused_versions,
    revised,
    write_revision,
)
from spotune.launch.code import differs, keep_code, read_code
from spotune.launch.engine import ACTIVE, Agree, Infra, JobStatus, is_infra
from spotune.launch.origins import Origin, from_run, goes_to, origins_of, revision_of, unseen_by
from spotune.launch.plan import Plan, check_model
from spotune.launch.settings import Workspace
from spotune.launch.status import find_run

# ``resume --set``: what a run that stands still is to go on with, as its next revision.


@dataclass(frozen=True)
class Edit:
    """``key=value`` overrides of the config in force; ``allow``: also of what may not change by itself.

    ``budget_usd``, ``month_usd``, ``month_of``, ``stall_after``: as in the record.
    With ``allow`` the data and the model as they are now, seen from here, are taken for the run's own. A run that
    failed because its libraries changed goes on under the new ones.
    """

    overrides: tuple[str, ...] = ()
    allow: bool = False
    budget_usd: float | None = None
    month_usd: float | None = None
    month_of: str = ""
    stall_after: str = ""


def revise(workspace: Workspace, status: JobStatus, edit: Edit) -> tuple[Change, RunRecord | None]:
    """What changes, and the revision to write for it, if any; raises InputError for what may not change.

    Writes nothing. What a month's budget leaves to a run is no change of it, but is written too.
    """
    store, keys = workspace.store(status.bucket), Keys(status.run_id)
    record = record_in_force(store, keys)
    if record is None:
        if edit == Edit() and read_mark(store, keys.failed):  # it never began: nothing could be changed of it
            return Change(), None
        raise InputError(status.run_id, "has no run.json in its bucket", remedy=f"is all of {store.url} there?")
    revision = revised(record, _wanted(record, edit, workspace), workspace.env.user, time.time())
    change = compare(record, revision)
    if edit.allow:
        change = replace(change, versions=refused_versions(store, keys))
    if not change and revision.month_usd == record.month_usd:
        return change, None
    allowed = admit(change, edit.allow, status.run_id, "would go on with", f"{FLAG}, or a run of its own")
    check_length(store, keys, revision)
    return change, replace(revision, allowed=allowed)


def _wanted(record: RunRecord, edit: Edit, workspace: Workspace) -> RunRecord:
    config = overlay(record.config, edit.overrides, record.run_id, record.allowed_env)
    wanted = replace(
        record,
        config=config,
        config_sha256=fingerprint(config),
        overrides=[*record.overrides, *edit.overrides],
        budget_usd=edit.budget_usd,
        month_usd=edit.month_usd,
        month_of=edit.month_of,
        stall_after=edit.stall_after,
    )
    if not edit.allow:  # other data or another model would be refused, so that nobody has to look at them
        return wanted
    check_model(config, record.config_path)
    data = data_files(config, record.config_path)
    model = model_files(config, record.config_path, workspace.env.cache)
    return replace(
        wanted,
        data_sha256=data_sha256(config, data),
        data_files=data,
        model_sha256=model_sha256(model),
        model_files=model,
    )


# What is done to a run that exists: cancel, resume, preempt. Marks in the bucket first, then the engine.

RESUMABLE = ("FAILED", "CANCELLED", "PAUSED")


@dataclass(frozen=True)
class Resumed:
    """``is_queued``: whether the run is back in a queue; ``change``: what it goes on with that is new.

    ``code``: how the code that it goes on with differs from what it was submitted with, in words.
    """

    is_queued: bool
    change: Change = field(default_factory=Change)
    code: str = ""


@dataclass(frozen=True)
class Resumption:
    """What a resumed run would go on with. ``takes`` and ``unseen``: as in a plan; ``revision``: in force so far."""

    run_id: str
    change: Change
    takes: tuple[Origin, ...] = ()
    unseen: tuple[str, ...] = ()
    revision: int = 0


def cancel(workspace: Workspace, run_id: str, clock: Callable[[], float] = time.time) -> JobStatus:
    """Stops a run and keeps its checkpoints; returns once nothing of it runs. Nothing happens to an ended one."""
    status = engine_run(workspace, run_id)
    if status.state not in ACTIVE:
        return status
    keys, store = Keys(run_id), workspace.store(status.bucket)
    # Before any signal: a machine that the engine cannot reach any more must find it.
    by = f"cancelled by {workspace.env.user}"
    mark = Mark(run_id=run_id, attempt=status.attempt, at=clock(), reason=by, exit_code=FAILED, step=status.step or 0)
    try:
        is_ours = store.create(keys.cancelled, mark.to_bytes())
    except (InputError, StoreError):  # not reachable from here: what runs on this machine is stopped all the same
        workspace.infra(status.infra).cancel(run_id)
        return find_run(workspace, run_id)
    try:
        workspace.infra(status.infra).cancel(run_id)
    except Unsettled:
        raise
    except SpotuneError:  # it goes on, and no later attempt of it may end of this
        if is_ours:
            store.delete([keys.cancelled])
        raise
    ended = find_run(workspace, run_id)
    if ended.state == "SUCCEEDED":  # it was certified before the signal came
        store.delete([keys.cancelled])
    return ended


def resume(
    workspace: Workspace, run_id: str, edit: Edit | None = None, agree: Callable[[Resumption], None] | None = None
) -> Resumed:
    """Lets a run that FAILED, was CANCELLED or is PAUSED go on, with nothing held against it, and as edited.

    A run that was started by hand or by a bare ``sky`` is only cleared of what held it back, and has to be started
    again where it was. ``agree`` is asked before anything is written; it raises to refuse.
    """
    status = find_run(workspace, run_id)
    if status.state not in RESUMABLE and not _stands(workspace, status):
        remedy = "it is finished" if status.state == "SUCCEEDED" else f"spotune logs -f {run_id}"
        raise InputError(run_id, f"is {status.state}: only {', '.join(RESUMABLE)} can be resumed", remedy=remedy)
    change, revision = revise(workspace, status, edit) if edit else (Change(), None)
    if agree:
        shown = _resumption(workspace, status, change, revision)
        agree(shown)
        now = record_in_force(workspace.store(status.bucket), Keys(run_id))
        if now and now.revision != shown.revision:  # while the user read
            raise InputError(run_id, "was changed by somebody else just now", remedy="try again")
    is_queued = go_on(workspace, status, revision)
    return Resumed(is_queued, change, _keep_other_code(workspace, status) if is_queued else "")


def _resumption(workspace: Workspace, status: JobStatus, change: Change, revision: RunRecord | None) -> Resumption:
    history = record_history(workspace.store(status.bucket), Keys(status.run_id))
    if not history:
        return Resumption(status.run_id, change)
    user, record = workspace.env.user, revision or history[-1]
    taken = [from_run(record, "its config, data, model and checkpoints")] if record.user != user else []
    taken += [*revision_of(user, history), *goes_to(user, history, record), *origins_of(record, workspace.cwd)]
    return Resumption(status.run_id, change, tuple(taken), tuple(unseen_by(user, history)), history[-1].revision)


def _stands(workspace: Workspace, status: JobStatus) -> bool:
    """Whether a run that its engine is still at has paused or failed for good: every further attempt ends at once."""
    keys, store = Keys(status.run_id), workspace.store(status.bucket)
    return status.state in ACTIVE and any(read_mark(store, key) for key in (keys.paused, keys.failed))


def go_on(workspace: Workspace, status: JobStatus, revision: RunRecord | None = None) -> bool:
    """Puts a run that stands still back into its queue; returns False where there is none within reach.

    One whose engine still starts it again, to no end, is ended first.
    """
    keys, store = Keys(status.run_id), workspace.store(status.bucket)
    is_queued = has_engine(workspace, status)
    if is_queued:
        workspace.infra(status.infra).check_resumable(status.run_id)
        if status.state in ACTIVE:
            workspace.infra(status.infra).cancel(status.run_id)
    if revision:  # before the marks go: from then on an attempt may start
        write_revision(store, keys, revision)
    store.delete([keys.failed, keys.cancelled, keys.paused])
    if is_queued:
        workspace.infra(status.infra).resume(status.run_id)
    return is_queued


def _keep_other_code(workspace: Workspace, status: JobStatus) -> str:
    """How the code differs from what the run was submitted with; if it does, it is kept beside that."""
    store, keys = workspace.store(status.bucket), Keys(status.run_id)
    record, folder = record_in_force(store, keys), workspace.infra(status.infra).workdir(status.run_id)
    if record is None or not record.code or not folder:
        return ""
    try:
        code = read_code(Path(folder))
    except InputError:  # the run goes on all the same
        return "git cannot say how"
    if words := differs(record.code, code.facts()):
        keep_code(code, store, f"{keys.code}/{datetime.now(UTC):%Y%m%dT%H%M%SZ}")
    return words


def preempt(workspace: Workspace, run_id: str, notice_s: float, agree: Agree) -> None:
    """Takes the run's machine away as a cloud does; ``agree`` is asked before one of a cloud's is terminated."""
    status = engine_run(workspace, run_id)
    if status.state not in ACTIVE:
        raise InputError(run_id, f"is {status.state}: it has no machine to take away")
    workspace.infra(status.infra).preempt(run_id, notice_s, agree)


def has_engine(workspace: Workspace, status: JobStatus) -> bool:
    """Whether an engine within reach has the run."""
    return is_infra(status.infra) and bool(workspace.infra(status.infra).jobs([status.run_id], everyone=True))


def engine_run(workspace: Workspace, run_id: str) -> JobStatus:
    """A run that an engine within reach has; raises InputError for one that is only in the bucket."""
    status = find_run(workspace, run_id)
    if not has_engine(workspace, status):
        what = "is in the bucket, but not in this machine's queue"
        raise InputError(run_id, what, remedy=f"spotune train --from {run_id}, or go where it was submitted")
    return status


# A plan that was agreed to becomes a run: its record in the bucket, its job in an engine, or nothing at all.
#
# An id that is taken already: the same run is left alone, or goes on. With another config, data or model it goes on as
# a revision, if it stands still and what changed may change, by itself or because it was asked for.

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
