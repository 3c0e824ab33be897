"""What is done to a run that exists: cancel, resume, preempt. Marks in the bucket first, then the engine."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from spotune.contracts.change import Change
from spotune.contracts.errors import InputError, SpotuneError, StoreError, Unsettled
from spotune.contracts.exits import FAILED
from spotune.contracts.keys import Keys
from spotune.contracts.marks import read_mark
from spotune.contracts.records import Mark, RunRecord
from spotune.contracts.revisions import record_history, record_in_force, write_revision
from spotune.launch.code import differs, keep_code, read_code
from spotune.launch.infra import ACTIVE, Agree, JobStatus, is_infra
from spotune.launch.origins import Origin, from_run, goes_to, origins_of, revision_of, unseen_by
from spotune.launch.revise import Edit, revise
from spotune.launch.status import find_run
from spotune.launch.workspace import Workspace

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
