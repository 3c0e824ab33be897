"""The record that an attempt goes by: as submitted or revised; made here for a run that was started by hand.

Once there is one, CONFIG is not followed. ``--allow-config-change`` follows it all the same, by a revision.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from spotune import __version__
from spotune.contracts.basemodel import model_files, model_sha256
from spotune.contracts.change import FLAG, compare, compare_configs
from spotune.contracts.config import load_config, overlay
from spotune.contracts.configkeys import key_faults, schema
from spotune.contracts.configwhole import source_faults
from spotune.contracts.durations import parse_save_every, parse_stall_after
from spotune.contracts.environment import SAVE_EVERY, STALL_AFTER, RunEnvironment
from spotune.contracts.envrule import allowed_in, check_env
from spotune.contracts.errors import BadRecord, InputError, StoreError, refuse
from spotune.contracts.fingerprint import data_files, data_sha256
from spotune.contracts.keys import Keys
from spotune.contracts.records import RunRecord, fingerprint
from spotune.contracts.revisions import check_length, record_in_force, revised, write_revision
from spotune.contracts.store import Store
from spotune.guard.admission import Request
from spotune.guard.say import say


def read_or_create_run(store: Store, keys: Keys, env: RunEnvironment, request: Request) -> RunRecord:
    """The record in force; a run that was started by hand or by a bare ``sky`` gets its ``run.json`` here.

    Raises InputError when a config that counts is wrong.
    """
    with for_people(keys):
        run = record_in_force(store, keys)
    if run is None:
        store.create(keys.run, _new_run(store, keys, env, request).to_bytes())
        run = record_in_force(store, keys)
        if run is None:
            raise StoreError(f"{keys.run}: written, but not there when read back")
    elif request.allow_config_change or env.allow_config_change:
        return _follow(store, keys, run, _as_asked(store, run, env, request), env)
    else:
        _check_config(run)
        check_env(run.config, keys.record(run.revision), env.allow_env)
        _say_what_is_not_followed(run, env, request)
    return run


@contextmanager
def for_people(keys: Keys) -> Iterator[None]:
    """Raises InputError for a record of the run that is damaged: no later attempt can mend it, as people can."""
    try:
        yield
    except BadRecord as error:
        raise InputError(keys.run_id, str(error), remedy="put the record back, or submit a new run") from error


def _check_config(run: RunRecord) -> None:
    """Raises InputError where the record's config is not one that was checked when it was written."""
    keys = Keys(run.run_id)
    # A key of another version is for the worker to judge.
    known = {key: value for key, value in run.config.items() if key in schema()["properties"]}
    faults = list(key_faults(known)) or list(source_faults(run.config.get("data") or []))
    where = keys.revision(run.revision) if run.revision else keys.run
    refuse(where, ((f"config.{fault.key}", fault.what, FLAG) for fault in faults))


def _new_run(store: Store, keys: Keys, env: RunEnvironment, request: Request) -> RunRecord:
    path = request.config_path or env.config
    if not path:
        raise InputError("command line", "no config", remedy="python -m spotune.sft CONFIG")
    _check_durations(env)
    config = load_config(path, request.profile, request.overrides, env.profile, env.allow_env)
    bare = RunRecord(
        run_id=keys.run_id,
        created_at=time.time(),
        user=env.user,
        team=env.team,
        kind=env.kind,
        config_path=path,
        profile=request.profile or env.profile,
        overrides=list(request.overrides),
        config={},
        config_sha256="",
        data_sha256="",
        save_every=env.save_every,
        stall_after=env.stall_after,
        code=_code(store, keys),
        versions={"spotune": __version__},
        allowed_env=allowed_in(config, env.allow_env),
    )
    return _resolved(bare, config, env)


def _check_durations(env: RunEnvironment) -> None:
    """Raises InputError for a variable that is no duration."""
    parse_save_every(env.save_every, SAVE_EVERY)
    parse_stall_after(env.stall_after, STALL_AFTER)


def _code(store: Store, keys: Keys) -> dict[str, object]:
    """What the launcher of a dev run on a cluster left of the code that it sent there; empty where nobody did."""
    try:
        facts = json.loads(store.read(f"{keys.code}/commit.json") or b"{}")
    except (BadRecord, ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _as_asked(store: Store, run: RunRecord, env: RunEnvironment, request: Request) -> RunRecord:
    """What the command line asks for now; without a CONFIG on it, the config in force with its overrides on top."""
    if request.config_path or env.config:
        return _new_run(store, Keys(run.run_id), env, request)
    overrides = [*run.overrides, *request.overrides]
    _check_durations(env)
    wanted = replace(run, overrides=overrides, save_every=env.save_every, stall_after=env.stall_after)
    return _resolved(wanted, overlay(run.config, request.overrides, run.config_path, env.allow_env), env)


def _resolved(run: RunRecord, config: dict[str, object], env: RunEnvironment) -> RunRecord:
    """``run`` with a config, and the fingerprints of what that names on this machine."""
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


def _follow(store: Store, keys: Keys, run: RunRecord, wanted: RunRecord, env: RunEnvironment) -> RunRecord:
    """Puts what is wanted in force, if it is anything new."""
    revision = revised(run, wanted, env.user, time.time())
    change = compare(run, revision)
    if not change:
        return run
    check_length(store, keys, revision)
    revision = replace(revision, allowed=change.bound)
    write_revision(store, keys, revision)
    say(f"{keys.run_id}, revision {revision.revision}: {change.as_followed()}")
    return revision


def _say_what_is_not_followed(run: RunRecord, env: RunEnvironment, request: Request) -> None:
    """One line where CONFIG now says something else than the record in force; none where it cannot be read."""
    path = request.config_path or env.config or run.config_path
    profile, default, overrides = request.profile, env.profile, request.overrides or run.overrides
    if run.infra:  # submitted by the launcher, which gives its command line to nobody but the record
        path, profile, overrides = run.config_path, run.profile, run.overrides
        default = "dev" if run.kind == "dev" else "prod"
    try:
        changes = compare_configs(run.config, load_config(path, profile, overrides, default, run.allowed_env))
    except InputError:
        return
    if changes:
        way = f"spotune cancel {run.run_id}, then spotune train {path} --name {run.run_id}" if run.infra else FLAG
        listed = "; ".join(map(str, changes))
        say(f"{path} is not followed, the run goes on as it was submitted: {listed} (to follow it: {way})")
