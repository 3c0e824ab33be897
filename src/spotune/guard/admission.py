"""May this attempt run at all, and as what: the run's record, its marks, and the claim of an attempt number."""

import time
from dataclasses import dataclass
from pathlib import Path
from random import SystemRandom
from typing import Any
from uuid import uuid4

from spotune import __version__
from spotune.contracts import exits
from spotune.contracts.config import load_config
from spotune.contracts.durations import parse_save_every
from spotune.contracts.environment import RunEnvironment
from spotune.contracts.errors import Fenced, InputError, StoreError
from spotune.contracts.fingerprint import data_files, data_sha256
from spotune.contracts.keys import Keys, check_run_id, new_run_id
from spotune.contracts.records import AttemptRecord, Mark, RunRecord, fingerprint
from spotune.contracts.store import Store
from spotune.guard.faults import last_event
from spotune.guard.machine import Machine
from spotune.guard.say import say


@dataclass(frozen=True)
class Request:
    """What the command line asked for; not read again once ``run.json`` exists."""

    config_path: str
    profile: str
    overrides: tuple[str, ...]


def choose_run_id(env: RunEnvironment, machine: Machine, request: Request) -> str:
    """The run's id: given, or of the managed job (stable over recoveries), or new for a run by hand."""
    if env.run_id:
        return check_run_id(env.run_id, "SPOTUNE_RUN_ID")
    if machine.job_id:
        suffix = f"-j{machine.job_id}"
        stem = new_run_id(machine.task_name or "run", SystemRandom())[:-5][: 25 - len(suffix)].rstrip("-")
        return check_run_id(stem + suffix, "SKYPILOT_MANAGED_JOB_ID")
    return new_run_id(Path(request.config_path).stem, SystemRandom())


def standing_verdict(store: Store, keys: Keys) -> int | None:
    """The exit code of a run that has ended already, None for one that may go on."""
    if store.exists(keys.completed):
        say(f"{keys.run_id} is finished and certified already: nothing to do")
        return exits.SUCCEEDED
    for key in (keys.failed, keys.cancelled, keys.paused):
        if data := store.read(key):
            mark = Mark.from_bytes(data, key)
            say(
                f"{keys.run_id} stands still since attempt {mark.attempt}: {mark.reason} (spotune resume {keys.run_id})"
            )
            return mark.exit_code
    return None


def read_or_create_run(store: Store, keys: Keys, env: RunEnvironment, request: Request) -> RunRecord:
    """``run.json`` as submitted; a run that was started by hand or by a bare ``sky`` gets it here.

    Raises InputError when the config is wrong, or the data is not what the run was submitted with.
    """
    data = store.read(keys.run)
    if data is None:
        store.create(keys.run, _new_run(keys, env, request).to_bytes())
        data = store.read(keys.run)
    if data is None:
        raise StoreError(f"{keys.run}: written, but not there when read back")
    return RunRecord.from_bytes(data, keys.run)


def _new_run(keys: Keys, env: RunEnvironment, request: Request) -> RunRecord:
    path = request.config_path or env.config
    if not path:
        raise InputError("command line", "no config", remedy="python -m spotune.sft CONFIG")
    parse_save_every(env.save_every, "SPOTUNE_SAVE_EVERY")
    profile = request.profile or env.profile
    config = load_config(path, request.profile, request.overrides, default_profile=env.profile)
    files = data_files(config, path)
    return RunRecord(
        run_id=keys.run_id,
        created_at=time.time(),
        user=env.user,
        config_path=path,
        profile=profile,
        overrides=list(request.overrides),
        config=config,
        config_sha256=fingerprint(config),
        data_sha256=data_sha256(config, files),
        data_files=files,
        save_every=env.save_every,
        versions={"spotune": __version__},
    )


def check_data(run: RunRecord) -> None:
    """Raises InputError when the training data is not what the run was submitted with."""
    files = data_files(run.config, run.config_path)
    if data_sha256(run.config, files) != run.data_sha256:
        before = {file["url"]: file for file in run.data_files}
        changed = [file["url"] for file in files if before.get(file["url"]) != file] or ["files were added or removed"]
        remedy = "put it back, or submit a new run"
        raise InputError(
            run.config_path, f"training data changed since submission: {changed[0]}", key="data", remedy=remedy
        )


def claim_attempt(store: Store, keys: Keys, machine: Machine, at_least: int = 1) -> AttemptRecord:
    """Claims the next attempt number, create-only: of two machines only one gets it, the other the next.

    ``at_least``: the engine's own count, which is ahead where a machine was lost before it could claim.
    """
    attempt = max(latest_attempt(store, keys), at_least - 1)
    spells_s = earlier_spells(store, keys, attempt)
    while True:
        attempt += 1
        record = AttemptRecord(
            run_id=keys.run_id,
            attempt=attempt,
            claimed_at=time.time(),
            claim_id=uuid4().hex,
            host=machine.host,
            infra=machine.infra,
            region=machine.region,
            zone=machine.zone,
            cluster_name=machine.cluster_name,
            engine_job_id=machine.engine_job_id,
            num_nodes=machine.num_nodes,
            ranks_per_node=machine.ranks,
            spells_s=spells_s,
        )
        # Read back: a store without conditional puts (some emulators) lets both writers think that they won.
        if (
            store.create(keys.attempt(attempt), record.to_bytes())
            and store.read(keys.attempt(attempt)) == record.to_bytes()
        ):
            return record


def earlier_spells(store: Store, keys: Keys, attempt: int) -> list[float]:
    """How long the run's machines up to this attempt lasted, seconds, of those that were taken away.

    Each attempt's record has those before it; its own end is in its events, or is their last.
    """
    data = store.read(keys.attempt(attempt)) if attempt else None
    if data is None:
        return []
    record = AttemptRecord.from_bytes(data, keys.attempt(attempt))
    last = last_event(store, keys, attempt)
    if not last or (last.get("event") == "end" and last.get("reason") != "preempted"):
        return record.spells_s
    return [*record.spells_s, round(max(0.0, float(last["t"]) - record.claimed_at), 1)]


def latest_attempt(store: Store, keys: Keys) -> int:
    """The highest attempt number claimed so far, 0 when there is none."""
    return max((int(name) for name in store.folders(keys.attempts) if name.isdigit()), default=0)


def check_fence(store: Store, keys: Keys, attempt: int) -> None:
    """Raises Fenced when a later attempt has claimed the run: this machine was given up for lost."""
    latest = latest_attempt(store, keys)
    if latest > attempt:
        raise Fenced(f"attempt {attempt} of {keys.run_id} is fenced off: attempt {latest} has taken over")


def leave_mark(store: Store, key: str, run_id: str, attempt: int, **facts: Any) -> None:
    """Writes ``failed.json`` or its like, once; ``facts``: reason, exit_code, step."""
    store.create(key, Mark(run_id=run_id, attempt=attempt, at=time.time(), **facts).to_bytes())
