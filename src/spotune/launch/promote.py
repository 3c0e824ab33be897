"""``train --from RUN``: the run that was tried, as a production job, with nothing changed underneath."""

import time
from dataclasses import replace
from random import SystemRandom

from spotune.contracts.basemodel import MODEL_KEYS
from spotune.contracts.config import load_config
from spotune.contracts.configkeys import recorded
from spotune.contracts.errors import InputError
from spotune.contracts.keys import Keys
from spotune.contracts.records import RunRecord, fingerprint
from spotune.contracts.revisions import record_history
from spotune.launch.code import differs
from spotune.launch.origins import from_run, goes_to, revision_of, unseen_by
from spotune.launch.plan import Plan, Wish, make_plan
from spotune.launch.status import find_run
from spotune.launch.workspace import Workspace


def promote(source: str, wish: Wish, workspace: Workspace) -> Plan:
    """The plan of a new run from ``source``'s config file and overrides, under the profile that ``wish`` says.

    Raises InputError when the config, the data, the model or the code is not what ``source`` ran with: what was tried
    is what goes to production. Overrides of the new command line come on top.
    """
    history = _history(source, workspace)
    record = history[-1]
    default = _default_profile(record)
    then = load_config(record.config_path, record.profile, record.overrides, default, record.allowed_env)
    if fingerprint(then) not in (record.config_sha256, fingerprint(recorded(record.config))):
        raise InputError(source, f"{record.config_path} has changed since", remedy="submit the config itself")
    overrides = (*record.overrides, *wish.overrides)
    wish = replace(wish, config_path=record.config_path, overrides=overrides)
    save_every, stall_after = wish.save_every or record.save_every, wish.stall_after or record.stall_after
    wish = replace(wish, save_every=save_every, stall_after=stall_after)
    plan = make_plan(wish, workspace, time.time, SystemRandom())
    if [_content(file) for file in plan.record.data_files] != [_content(file) for file in record.data_files]:
        raise InputError(source, "its data has changed since", remedy="submit the config itself")
    is_same_model = all(plan.record.config.get(key) == record.config.get(key) for key in MODEL_KEYS)
    if is_same_model and record.model_sha256 and plan.record.model_sha256 != record.model_sha256:
        raise InputError(source, "its model has changed since", remedy="submit the config itself")
    if not record.code.get("commit") or not plan.record.code:
        raise InputError(source, "its code is not known: it was not submitted from a git commit")
    if words := differs(record.code, plan.record.code):
        is_there = record.code["commit"] == plan.record.code.get("commit")
        patch = f"{plan.bucket}/{Keys(source).code}/diff.patch has what they were"
        remedy = patch if is_there else f"git checkout {record.code['commit'][:12]}"
        raise InputError(source, f"its code has changed since: {words}", remedy=remedy)
    taken = [from_run(record, "its config, overrides, data and model")]
    user = workspace.env.user
    taken += [*revision_of(user, history), *goes_to(user, history, plan.record)]
    unseen = tuple(unseen_by(user, history))
    return replace(plan, takes=(*taken, *plan.takes), unseen=unseen)


def _history(run_id: str, workspace: Workspace) -> list[RunRecord]:
    status = find_run(workspace, run_id)
    history = record_history(workspace.store(status.bucket), Keys(run_id))
    if not history:
        raise InputError(run_id, "has no run.json in its bucket")
    return history


def _default_profile(record: RunRecord) -> str:
    return "dev" if record.kind == "dev" else "prod"


def _content(file: dict[str, object]) -> tuple[object, ...]:
    return tuple(file.get(name) for name in ("source", "size", "sha256", "checksum"))
