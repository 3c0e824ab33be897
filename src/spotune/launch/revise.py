"""``resume --set``: what a run that stands still is to go on with, as its next revision."""

import time
from dataclasses import dataclass, replace

from spotune.contracts.basemodel import model_files, model_sha256
from spotune.contracts.change import FLAG, Change, admit, compare
from spotune.contracts.config import overlay
from spotune.contracts.errors import InputError
from spotune.contracts.fingerprint import data_files, data_sha256
from spotune.contracts.keys import Keys
from spotune.contracts.marks import read_mark
from spotune.contracts.records import RunRecord, fingerprint
from spotune.contracts.revisions import check_length, record_in_force, refused_versions, revised
from spotune.launch.checks import check_model
from spotune.launch.infra import JobStatus
from spotune.launch.workspace import Workspace


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
    config = overlay(record.config, edit.overrides, record.run_id)
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
