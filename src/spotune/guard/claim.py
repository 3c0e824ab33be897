"""Decides whether an attempt may run, and as what: the run's record, its marks, the claim of an attempt number."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from random import SystemRandom
from typing import Any
from uuid import uuid4

from spotune import __version__
from spotune.core import errors, revisions
from spotune.core.config import load_config, overlay
from spotune.core.config_keys import allowed_in, check_env, key_faults, schema
from spotune.core.config_rules import source_faults
from spotune.core.environment import SAVE_EVERY, STALL_AFTER, RunEnvironment, parse_save_every, parse_stall_after
from spotune.core.errors import BadRecord, Fenced, InputError, Misplaced, StoreError, refuse
from spotune.core.fingerprint import data_files, data_sha256, model_files, model_sha256
from spotune.core.keys import MOST_ATTEMPTS, Keys, attempt_number, check_run_id, new_run_id, plain
from spotune.core.records import AttemptRecord, RunRecord, TerminalMarker, fingerprint, read_mark
from spotune.core.store import Store
from spotune.guard.journal import Node, log
from spotune.guard.restore import last_event


@dataclass(frozen=True)
class RunRequest:
    """What the command line asked for. Once ``run.json`` exists it counts only if a change is allowed."""

    config_path: str
    profile: str
    overrides: tuple[str, ...]
    allow_config_change: bool = False
    allow_env: tuple[str, ...] = ()


def choose_run_id(env: RunEnvironment, machine: Node, request: RunRequest) -> str:
    """Returns the run's id: given, or the managed job's (stable over recoveries), or a new one for a run by hand."""
    if env.run_id:
        return check_run_id(env.run_id, "SPOTUNE_RUN_ID")
    if machine.job_id:
        suffix = f"-j{machine.job_id}"
        stem = new_run_id(machine.task_name or "run", SystemRandom())[:-5][: 25 - len(suffix)].rstrip("-")
        return check_run_id(stem + suffix, "SKYPILOT_MANAGED_JOB_ID")
    return new_run_id(Path(request.config_path).stem, SystemRandom())


def standing_verdict(store: Store, keys: Keys) -> int | None:
    """Returns the exit code of a run that has ended already, None if it may go on."""
    if store.exists(keys.completed):
        log(f"{keys.run_id} is finished and certified already")
        return errors.SUCCEEDED
    for key in (keys.failed, keys.cancelled, keys.paused):
        if mark := read_mark(store, key):
            again = f"spotune resume {keys.run_id}"
            log(f"{keys.run_id} stands still since attempt {mark.attempt}: {mark.reason} ({again})")
            return mark.exit_code
    return None


def check_data(run: RunRecord) -> None:
    """Raises InputError if the training data differs from the record in force."""
    files = data_files(run.config, run.config_path)
    if data_sha256(run.config, files) != run.data_sha256:
        changed = revisions.few(revisions.changed_files(run.data_files, files, "url") or ("its fingerprint",))
        what = f"training data changed since the run began: {changed}"
        raise InputError(run.config_path, what, key="data", remedy=_remedy(run))


def check_model(run: RunRecord, cache: Path | None = None) -> None:
    """Raises InputError if the base model differs from the record in force. ``cache``: for hashes of large files."""
    if not run.model_sha256:
        return
    files = model_files(run.config, run.config_path, cache)
    if model_sha256(files) == run.model_sha256:
        return
    key = "model_name_or_path"
    if any("sha256" in file for file in run.model_files) and not any("sha256" in file for file in files):
        what = f"no folder {run.config[key]} on this machine"
        raise InputError(run.config_path, what, key=key, remedy="put it there")
    changed = revisions.few(revisions.changed_files(run.model_files, files, "name") or ("its fingerprint",))
    raise InputError(run.config_path, f"model changed since the run began: {changed}", key=key, remedy=_remedy(run))


def _remedy(run: RunRecord) -> str:
    return f"put it back, or spotune resume {run.run_id} {revisions.FLAG}"


def claim_attempt(store: Store, keys: Keys, machine: Node, at_least: int = 1, gpu_share: float = 0.0) -> AttemptRecord:
    """Claims the next attempt number, create-only: of two machines one gets it, the other gets the next.

    ``at_least``: the engine's own count, ahead if a machine was lost before its claim. ``gpu_share``: GPUs of each node
    that it asked a shared cluster for, 0 if unknown.
    """
    attempt = max(latest_attempt(store, keys), at_least - 1)
    uptimes_s = earlier_uptimes(store, keys, attempt)
    of_node = ("host", "infra", "region", "zone", "cluster_name", "engine_job_id", "num_nodes")
    while True:
        attempt += 1
        if attempt > MOST_ATTEMPTS:
            raise InputError(keys.attempts, f"claims {MOST_ATTEMPTS} attempts", remedy="remove what no machine claimed")
        record = AttemptRecord(
            run_id=keys.run_id,
            attempt=attempt,
            claimed_at=time.time(),
            claim_id=uuid4().hex,
            ranks_per_node=machine.ranks,
            gpu_share=gpu_share,
            spells_s=uptimes_s,
            **{name: getattr(machine, name) for name in of_node},
        )
        key, data = keys.attempt(attempt), record.to_bytes()
        # Read back: in a store without conditional puts (some emulators) both writers believe that they won.
        try:
            if store.create(key, data) and store.read(key) == data:
                return record
        except Misplaced as error:  # a link or a file in the place of the attempt's folder
            log(f"attempt {attempt} cannot be claimed, the next one is: {error}")


def earlier_uptimes(store: Store, keys: Keys, attempt: int) -> list[float]:
    """Returns the seconds that each preempted machine of the run lasted, up to this attempt's."""
    try:
        data = store.read(keys.attempt(attempt)) if attempt else None
        if data is None:
            return []
        record = AttemptRecord.from_bytes(data, keys.attempt(attempt))
    except BadRecord as error:
        log(f"how long earlier machines lasted is not known: {error}")
        return []
    last = last_event(store, keys, attempt)
    if not last or (last.get("event") == "end" and last.get("reason") != "preempted"):
        return record.spells_s
    return [*record.spells_s, round(max(0.0, float(last.get("t", 0.0)) - record.claimed_at), 1)]


def latest_attempt(store: Store, keys: Keys) -> int:
    """Returns the highest attempt number claimed so far, 0 for none. Ignores folders with an odd name."""
    return max((number for name in store.folders(keys.attempts) if (number := attempt_number(name))), default=0)


def check_fence(store: Store, keys: Keys, attempt: int) -> None:
    """Raises Fenced if a later attempt has claimed the run: the engine took this machine for lost."""
    latest = latest_attempt(store, keys)
    if latest > attempt:
        raise Fenced(f"attempt {attempt} of {keys.run_id} is fenced off: attempt {latest} has taken over")


def leave_mark(store: Store, key: str, run_id: str, attempt: int, **facts: Any) -> None:
    """Writes a mark such as ``failed.json``, once; ``facts``: reason, exit_code, step."""
    facts["reason"] = plain(facts["reason"])  # it may name a file whose name is not UTF-8
    store.create(key, TerminalMarker(run_id=run_id, attempt=attempt, at=time.time(), **facts).to_bytes())


def read_or_create_run(store: Store, keys: Keys, env: RunEnvironment, request: RunRequest) -> RunRecord:
    """Returns the record in force; writes ``run.json`` for a run that was started by hand or by a bare ``sky``.

    An existing record overrides CONFIG; ``--allow-config-change`` puts CONFIG in force by a revision. Raises InputError
    if the config in force is wrong.
    """
    with for_people(keys):
        run = revisions.record_in_force(store, keys)
    if run is None:
        store.create(keys.run, _new_run(store, keys, env, request).to_bytes())
        run = revisions.record_in_force(store, keys)
        if run is None:
            raise StoreError(f"{keys.run}: written, but not there when read back")
    elif request.allow_config_change or env.allow_config_change:
        return _revise(store, keys, run, env, request)
    else:
        _check_config(run)
        check_env(run.config, keys.record(run.revision), env.allow_env)
        _log_ignored_changes(run, env, request)
    return run


@contextmanager
def for_people(keys: Keys) -> Iterator[None]:
    """Raises InputError for a damaged record of the run: only people can mend it, no later attempt."""
    try:
        yield
    except BadRecord as error:
        raise InputError(keys.run_id, str(error), remedy="put the record back, or submit a new run") from error


def _check_config(run: RunRecord) -> None:
    """Raises InputError for a record whose config nobody can have checked when it was written."""
    # A key of another version is for the worker to judge.
    known = {key: value for key, value in run.config.items() if key in schema()["properties"]}
    faults = list(key_faults(known)) or list(source_faults(run.config.get("data") or []))
    refuse(
        Keys(run.run_id).record(run.revision), ((f"config.{fault.key}", fault.what, revisions.FLAG) for fault in faults)
    )


def _new_run(store: Store, keys: Keys, env: RunEnvironment, request: RunRequest) -> RunRecord:
    path = request.config_path or env.config
    if not path:
        raise InputError("command line", "no config", remedy="python -m spotune.sft CONFIG")
    _check_durations(env)
    config = load_config(path, request.profile, request.overrides, env.profile, env.allow_env)
    try:  # the launcher of a dev run on a cluster leaves what it knows of the code that it sent there
        code = json.loads(store.read(f"{keys.code}/commit.json") or b"{}")
    except (BadRecord, ValueError, RecursionError):
        code = {}
    bare = RunRecord(
        run_id=keys.run_id,
        created_at=time.time(),
        config_path=path,
        profile=request.profile or env.profile,
        overrides=list(request.overrides),
        config={},
        config_sha256="",
        data_sha256="",
        code=code if isinstance(code, dict) else {},
        versions={"spotune": __version__},
        allowed_env=allowed_in(config, env.allow_env),
        **{name: getattr(env, name) for name in ("user", "team", "kind", "save_every", "stall_after")},
    )
    return _resolved(bare, config, env)


def _check_durations(env: RunEnvironment) -> None:
    parse_save_every(env.save_every, SAVE_EVERY)
    parse_stall_after(env.stall_after, STALL_AFTER)


def _resolved(run: RunRecord, config: dict[str, object], env: RunEnvironment) -> RunRecord:
    """Returns ``run`` with a config and the fingerprints of its data and model on this machine."""
    data = data_files(config, run.config_path)
    model = model_files(config, run.config_path, env.cache)
    return replace(
        run,
        config=config,
        config_sha256=fingerprint(config),
        data_sha256=data_sha256(config, data),
        data_files=data,
        model_sha256=model_sha256(model),
        model_files=model,
    )


def _revise(store: Store, keys: Keys, run: RunRecord, env: RunEnvironment, request: RunRequest) -> RunRecord:
    """Puts the command line in force if it changes anything; without a CONFIG, its overrides on the config in force."""
    if request.config_path or env.config:
        wanted = _new_run(store, keys, env, request)
    else:
        overrides = [*run.overrides, *request.overrides]
        _check_durations(env)
        wanted = replace(run, overrides=overrides, save_every=env.save_every, stall_after=env.stall_after)
        wanted = _resolved(wanted, overlay(run.config, request.overrides, run.config_path, env.allow_env), env)
    revision = revisions.revised(run, wanted, env.user, time.time())
    change = revisions.compare(run, revision)
    if not change:
        return run
    revisions.check_length(store, keys, revision)
    revision = replace(revision, allowed=change.bound)
    revisions.write_revision(store, keys, revision)
    log(f"{keys.run_id}, revision {revision.revision}: {change.as_followed()}")
    return revision


def _log_ignored_changes(run: RunRecord, env: RunEnvironment, request: RunRequest) -> None:
    """Logs a line if CONFIG differs from the record in force; nothing if CONFIG cannot be read."""
    path = request.config_path or env.config or run.config_path
    profile, default, overrides = request.profile, env.profile, request.overrides or run.overrides
    if run.infra:  # submitted by the launcher, whose command line is only in the record
        path, profile, overrides = run.config_path, run.profile, run.overrides
        default = "dev" if run.kind == "dev" else "prod"
    try:
        changes = revisions.compare_configs(run.config, load_config(path, profile, overrides, default, run.allowed_env))
    except InputError:
        return
    if changes:
        way = (
            f"spotune cancel {run.run_id}, then spotune train {path} --name {run.run_id}"
            if run.infra
            else revisions.FLAG
        )
        listed = "; ".join(map(str, changes))
        log(f"{path} is not followed, the run goes on as it was submitted: {listed} (to follow it: {way})")
