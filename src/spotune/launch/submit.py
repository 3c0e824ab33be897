"""A plan that was agreed to becomes a run: its record in the bucket, its job in an engine, or nothing at all."""

import json
from typing import Literal

from spotune.contracts.errors import InputError
from spotune.contracts.keys import Keys
from spotune.contracts.records import RunRecord
from spotune.contracts.store import Store
from spotune.launch.infra import ACTIVE, Infra
from spotune.launch.plan import Plan
from spotune.launch.status import find_run
from spotune.launch.workspace import Workspace

Submitted = Literal["submitted", "active", "succeeded"]


def submit(plan: Plan, workspace: Workspace) -> Submitted:
    """Submits the plan, or says what the run that has its id already is doing.

    Returns:
        ``submitted``; ``active`` when the same run is under way; ``succeeded`` when it is finished.
        Raises InputError when the id belongs to another config, or to a run that has ended otherwise.
    """
    store, infra = workspace.store(plan.bucket), workspace.infra(plan.infra)
    keys = Keys(plan.run_id)
    if not store.create(keys.run, plan.record.to_bytes()):
        _check_same(plan, store)
        if infra.jobs([plan.run_id]) or store.folders(keys.attempts):
            return _state_of_existing(plan, workspace)
        # run.json without a job: the launcher died in between. It is the same run, so this one goes on from there.
    _enqueue(plan, store, infra)
    return "submitted"


def check_submittable(plan: Plan, workspace: Workspace) -> None:
    """Raises what ``submit`` would raise for a run that has the plan's id already; writes nothing."""
    store, infra = workspace.store(plan.bucket), workspace.infra(plan.infra)
    keys = Keys(plan.run_id)
    if store.read(keys.run) is None:
        return
    _check_same(plan, store)
    if infra.jobs([plan.run_id]) or store.folders(keys.attempts):
        _state_of_existing(plan, workspace)


def _enqueue(plan: Plan, store: Store, infra: Infra) -> None:
    """Writes the code's state and hands the job over; whatever stops it, no trace of the run stays behind."""
    keys = Keys(plan.run_id)
    written = [keys.run]
    try:
        if plan.code.commit:
            written.append(f"{keys.code}/commit.json")
            store.write(written[-1], json.dumps(plan.code.facts(), indent=1).encode())
        if plan.code.diff:
            written.append(f"{keys.code}/diff.patch")
            store.write(written[-1], plan.code.diff)
        infra.submit(plan.submission)
    except BaseException:
        store.delete(written)
        raise


def _check_same(plan: Plan, store: Store) -> None:
    """Raises InputError when the run that has the id is another one."""
    data = store.read(Keys(plan.run_id).run)
    if data is None:
        raise InputError("--name", f"{plan.run_id} was taken and given up just now", remedy="try again")
    record = RunRecord.from_bytes(data, plan.run_id)
    if record.config_sha256 != plan.record.config_sha256:
        what = f"{plan.run_id} exists with another config ({record.config_path}, {record.config_sha256[:12]})"
        raise InputError("--name", what, remedy="choose another --name")
    if record.data_sha256 != plan.record.data_sha256:
        raise InputError("--name", f"{plan.run_id} exists with other data", remedy="choose another --name")


def _state_of_existing(plan: Plan, workspace: Workspace) -> Submitted:
    status = find_run(workspace, plan.run_id)
    if status.state == "SUCCEEDED":
        return "succeeded"
    if status.state in ACTIVE:
        return "active"
    raise InputError(plan.run_id, f"has ended {status.state}", remedy=f"spotune resume {plan.run_id}")
