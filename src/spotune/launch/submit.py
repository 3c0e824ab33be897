"""Submit, revise, cancel, resume and preempt a run: records in the bucket first, then the engine."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from spotune.core import revisions
from spotune.core.config import overlay
from spotune.core.config_keys import FLAG as FLAG_ENV
from spotune.core.errors import FAILED as EXIT_FAILED
from spotune.core.errors import AlreadyExists, InfraError, InputError, SpotuneError, StoreError, SubmissionUnknown
from spotune.core.keys import Keys
from spotune.core.records import RunRecord, TerminalMarker, fingerprint, read_mark
from spotune.core.revisions import FLAG, Change
from spotune.launch.code import differs, keep_code, read_code
from spotune.launch.engine import ACTIVE, Agree, Infra, JobStatus
from spotune.launch.origins import Origin, from_run, goes_to, origins_of, revision_of, unseen_by
from spotune.launch.plan import Plan, Training
from spotune.launch.settings import Workspace
from spotune.launch.status import Run


@dataclass(frozen=True)
class Edit:
    """What ``resume`` changes: ``key=value`` overrides of the config in force, and fields of the record.

    ``allow``: also change what may not change by itself. The data and the model as they are now become the run's, and
    a run that failed because its libraries changed goes on with the new ones.
    """

    overrides: tuple[str, ...] = ()
    allow: bool = False
    budget_usd: float | None = None
    month_usd: float | None = None
    month_of: str = ""
    stall_after: str = ""


def _revise(run: Run, edit: Edit) -> tuple[Change, RunRecord | None]:
    """Returns the change, and the revision to write for it, if any. Writes nothing.

    What a month's budget leaves to a run is not a change, but is written too. Raises InputError.
    """
    if run.record is None:
        if edit == Edit() and read_mark(run.store, run.keys.failed):  # it never began: there is nothing to change
            return Change(), None
        raise InputError(run.run_id, "has no run.json in its bucket", remedy=f"is all of {run.store.url} there?")
    wanted = _wanted(run.record, edit, run.workspace)
    revision = revisions.revised(run.record, wanted, run.workspace.env.user, time.time())
    change = revisions.compare(run.record, revision)
    if edit.allow:
        change = replace(change, versions=revisions.refused_versions(run.store, run.keys))
    if not change and revision.month_usd == run.record.month_usd:
        return change, None
    allowed = revisions.admit(change, edit.allow, run.run_id, "would go on with", f"{FLAG}, or a run of its own")
    revisions.check_length(run.store, run.keys, revision)
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
    if not edit.allow:  # another data or model would be refused, so that their files need not be read
        return wanted
    return replace(wanted, **vars(Training.read(config, record.config_path, workspace.env.cache)))


# What is done to a run that exists: cancel, resume, preempt. Marks in the bucket first, then the engine.

RESUMABLE = ("FAILED", "CANCELLED", "PAUSED")


@dataclass(frozen=True)
class Resumption:
    """What a resumed run would go on with. ``takes`` and ``unseen``: as in ``Plan``."""

    run_id: str
    change: Change
    takes: tuple[Origin, ...] = ()
    unseen: tuple[str, ...] = ()


def cancel(run: Run) -> JobStatus:
    """Stops a run of an engine and keeps its checkpoints. Returns when none of its processes runs any more."""
    if run.status.state not in ACTIVE or run.engine is None:
        return run.status
    # The mark comes before any signal: a machine that the engine cannot reach any more must find it.
    mark = TerminalMarker(
        run_id=run.run_id,
        attempt=run.status.attempt,
        at=time.time(),
        reason=f"cancelled by {run.workspace.env.user}",
        exit_code=EXIT_FAILED,
        step=run.status.step or 0,
    )
    try:
        is_ours = run.store.create(run.keys.cancelled, mark.to_bytes())
    except (InputError, StoreError):  # the bucket is not reachable from here: the run is stopped all the same
        run.engine.cancel(run.run_id)
        return run.refresh().status
    try:
        run.engine.cancel(run.run_id)
    except SubmissionUnknown:
        raise
    except SpotuneError:  # the run goes on, and the mark must not end a later attempt
        if is_ours:
            run.store.delete([run.keys.cancelled])
        raise
    ended = run.refresh().status
    if ended.state == "SUCCEEDED":  # it was certified before the signal came
        run.store.delete([run.keys.cancelled])
    return ended


def resume(run: Run, edit: Edit, agree: Callable[[Resumption], None]) -> "Submitted":
    """Lets a run that FAILED, was CANCELLED or is PAUSED go on, as edited.

    A run that was started by hand or by a bare ``sky`` only loses its marks, and has to be started again where it was.
    ``agree`` is called before anything is written; it raises to refuse.
    """
    state, marks = run.status.state, (run.keys.paused, run.keys.failed)
    # An active run with a mark has paused or failed for good: every further attempt ends at once.
    if state not in RESUMABLE and not (state in ACTIVE and any(read_mark(run.store, key) for key in marks)):
        remedy = "it is finished" if state == "SUCCEEDED" else f"spotune logs -f {run.run_id}"
        raise InputError(run.run_id, f"is {state}: only {', '.join(RESUMABLE)} can be resumed", remedy=remedy)
    change, revision = _revise(run, edit)
    agree(_resumption(run, change, revision))
    now = revisions.record_in_force(run.store, run.keys)  # a fresh read: another user may have revised it meanwhile
    if now and run.record and now.revision != run.record.revision:
        raise InputError(run.run_id, "was changed by somebody else just now", remedy="try again")
    return Submitted(_go_on(run, revision), change, _keep_other_code(run))


def _resumption(run: Run, change: Change, revision: RunRecord | None) -> Resumption:
    if not run.history:
        return Resumption(run.run_id, change)
    user, record = run.workspace.env.user, revision or run.history[-1]
    taken = [from_run(record, "its config, data, model and checkpoints")] if record.user != user else []
    taken += [*revision_of(user, run.history), *goes_to(user, run.history, record)]
    taken += origins_of(record, run.workspace.cwd)
    return Resumption(run.run_id, change, tuple(taken), tuple(unseen_by(user, run.history)))


def _go_on(run: Run, revision: RunRecord | None) -> "Outcome":
    """Puts a run that stands still back into its queue, or only clears its marks if no engine within reach has it.

    An engine that still restarts the run is told to cancel it first.
    """
    if run.engine:
        run.engine.check_resumable(run.run_id)
        if run.status.state in ACTIVE:
            run.engine.cancel(run.run_id)
    store, keys = run.store, run.keys
    if revision:  # before the marks go: from then on an attempt may start
        revisions.write_revision(store, keys, revision)
    store.delete([keys.failed, keys.cancelled, keys.paused])
    if run.engine:
        run.engine.resume(run.run_id)
    return "resumed" if run.engine else "cleared"


def _keep_other_code(run: Run) -> str:
    """Returns how the code differs from what the run was submitted with, and uploads it beside that."""
    folder = run.engine.workdir(run.run_id) if run.engine else ""
    if not folder or run.record is None or not run.record.code:
        return ""
    try:
        code = read_code(Path(folder))
    except InputError:  # the run goes on all the same
        return "git cannot say how"
    if words := differs(run.record.code, code.facts()):
        keep_code(code, run.store, f"{run.keys.code}/{datetime.now(UTC):%Y%m%dT%H%M%SZ}")
    return words


def preempt(run: Run, notice_s: float, agree: Agree) -> None:
    """Takes the run's machine away as a cloud does. Calls ``agree`` before it terminates a cloud's instance."""
    if run.status.state not in ACTIVE or run.engine is None:
        raise InputError(run.run_id, f"is {run.status.state}: it has no machine to take away")
    run.engine.preempt(run.run_id, notice_s, agree)


# Submission writes the run's record and gives its job to an engine, or leaves nothing behind. If the same run has the
# id already, it is left alone or goes on. It goes on with another config, data or model, as a revision, if it stands
# still and the change is allowed, by itself or by the flag.

Outcome = Literal["submitted", "active", "succeeded", "resumed", "cleared"]
OTHER_NAME = "choose another --name"


@dataclass(frozen=True)
class Submitted:
    """The result of ``submit`` and ``resume``.

    ``submitted``: a new run. ``active``, ``succeeded``: the same run is already under way, or finished. ``resumed``:
    the run is back in its queue. ``cleared``: it may go on, but has to be started again where it was.
    ``code``: how a resumed run's code differs from what it was submitted with, in words.
    """

    outcome: Outcome
    change: Change = field(default_factory=Change)
    code: str = ""


@dataclass(frozen=True)
class Existing:
    """The run that has a plan's id. ``run`` is None if no engine ever got it; ``history`` is its record's."""

    run: Run | None
    change: Change
    revision: RunRecord
    history: tuple[RunRecord, ...] = ()


def submit(plan: Plan, workspace: Workspace) -> Submitted:
    """Submits the plan, or lets the run that already has its id go on as planned.

    Raises InputError if that run is another one, is under way as another one, or has ended and nothing changed.
    """
    store, keys = workspace.store(plan.bucket), Keys(plan.run_id)
    is_new = store.create(keys.run, plan.record.to_bytes())
    if is_new and _enqueue(plan, workspace, [keys.run], plan.record.created_at, is_new=True):
        return Submitted("submitted")
    found = existing(plan, workspace)
    if found and found.run is None:
        # run.json without a job: the launcher died, or has not come that far. It is the same run, so this submission
        # completes it.
        written = [keys.revision(found.revision.revision)] if found.change else []
        if written:
            revisions.write_revision(store, keys, found.revision)
        if _enqueue(plan, workspace, written, found.revision.created_at, is_new=False):
            store.create(keys.run, plan.record.to_bytes())  # the other submission may have taken it back
            return Submitted("submitted", found.change)
        found = existing(plan, workspace)
    if found is None or found.run is None:
        raise InputError("--name", f"{plan.run_id} was taken and given up just now", remedy="try again")
    if not found.change:
        return Submitted("succeeded" if found.run.status.state == "SUCCEEDED" else "active")
    return Submitted(_go_on(found.run, found.revision), found.change)


def existing(plan: Plan, workspace: Workspace) -> Existing | None:
    """Returns the run that has the plan's id, or None. Raises what ``submit`` would raise. Writes nothing.

    Reads everything anew at each call, since another submission may be at work.
    """
    store, keys = workspace.store(plan.bucket), Keys(plan.run_id)
    history = revisions.record_history(store, keys)
    if not history:
        return None
    record = history[-1]
    if more := sorted(set(plan.record.allowed_env) - set(record.allowed_env)):
        what = f"{plan.run_id} was submitted without {', '.join(more)}, and its machines refuse it"
        raise InputError(FLAG_ENV, what, remedy=OTHER_NAME)
    revision = revisions.revised(record, plan.record, plan.record.user, plan.record.created_at)
    if record.kind != plan.record.kind:
        what = "a dev run" if record.kind == "dev" else "a production run"
        raise InputError("--name", f"{plan.run_id} is {what}", remedy=OTHER_NAME)
    change = revisions.compare(record, revision)
    if plan.allow_config_change:
        change = replace(change, versions=revisions.refused_versions(store, keys))
    # Another engine than this plan's may have it, so every engine is asked.
    is_started = any(engine.jobs([plan.run_id]) for engine in workspace.engines()) or store.folders(keys.attempts)
    run = Run.find(workspace, plan.run_id) if is_started else None
    state = run.status.state if run else None
    if not change:
        if state and state not in (*ACTIVE, "SUCCEEDED"):
            raise InputError(plan.run_id, f"has ended {state}", remedy=f"spotune resume {plan.run_id}")
    else:
        _check_open(plan, record, state, change)
        remedy = f"{FLAG} to go on with it, or {OTHER_NAME}"
        allowed = revisions.admit(change, plan.allow_config_change, "--name", f"{plan.run_id} exists with", remedy)
        revision = replace(revision, allowed=allowed)
        revisions.check_length(store, keys, revision)
    return Existing(run, change, revision, tuple(history))


def with_existing(plan: Plan, found: Existing | None) -> Plan:
    """Returns the plan with what it takes from the run that already has its id: its owner, and its revisions."""
    if found is None:
        return plan
    user, record = plan.record.user, found.history[-1]
    taken = [from_run(record, "its checkpoints")] if record.user != user else []
    taken += revision_of(user, found.history)
    is_left_alone = not found.change and found.run is not None
    unseen = plan.unseen if is_left_alone else (*plan.unseen, *unseen_by(user, found.history))
    return replace(plan, takes=(*taken, *plan.takes), unseen=tuple(dict.fromkeys(unseen)))


def _check_open(plan: Plan, record: RunRecord, state: str | None, change: Change) -> None:
    """Raises InputError for a run that cannot be changed: finished, under way, or interactive."""
    what = f"with {change.as_differing()}"
    if state == "SUCCEEDED":
        raise InputError("--name", f"{plan.run_id} is finished, {what}", remedy=OTHER_NAME)
    if state in ACTIVE:
        remedy = f"spotune cancel {plan.run_id} first, or {OTHER_NAME}"
        raise InputError("--name", f"{plan.run_id} is under way {what}", remedy=remedy)
    if record.kind == "dev":
        raise InputError("--name", f"{plan.run_id} exists {what}", remedy=OTHER_NAME)


def _enqueue(plan: Plan, workspace: Workspace, written: list[str], since: float, is_new: bool) -> bool:
    """Uploads the code and submits the job. On failure its writes are rolled back, unless the run may have a job.

    Returns False if another submission of the same run was faster: the record and the code are now that submission's.

    Args:
        written: the keys that this submission has written already.
        since: when the record in the bucket was made, epoch seconds.
        is_new: whether this submission wrote that record; else the uploaded code is another submission's, and stays.
    """
    store, infra, keys = workspace.store(plan.bucket), workspace.infra(plan.infra), Keys(plan.run_id)
    code: list[str] = []
    try:
        if is_new or not store.keys(keys.code):
            keep_code(plan.code, store, keys.code, code)
        infra.submit(plan.submission)
    except SubmissionUnknown:
        raise
    except BaseException as error:
        has_job = _has_job(plan, infra, since)
        if has_job is False:
            store.delete([*written, *code])
        elif not is_new:
            store.delete(written)  # its own revision, which would be in force
        if has_job and isinstance(error, AlreadyExists):
            return False
        raise
    return True


def _has_job(plan: Plan, infra: Infra, since: float) -> bool | None:
    """Returns whether the record in the bucket has a job, and not an earlier record. None: the engine cannot tell."""
    try:
        jobs = infra.jobs([plan.run_id])
    except InfraError:
        return None
    return any(job.bucket == plan.bucket and job.submitted_at >= since for job in jobs)
