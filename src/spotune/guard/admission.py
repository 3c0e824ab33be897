"""May this attempt run at all, and as what: its marks, its data and model, and the claim of an attempt number."""

import time
from dataclasses import dataclass
from pathlib import Path
from random import SystemRandom
from typing import Any
from uuid import uuid4

from spotune.contracts import exits
from spotune.contracts.basemodel import model_files, model_sha256
from spotune.contracts.change import FLAG, changed_files, few
from spotune.contracts.environment import RunEnvironment
from spotune.contracts.errors import BadRecord, Fenced, InputError, Misplaced
from spotune.contracts.fingerprint import data_files, data_sha256
from spotune.contracts.keys import Keys, attempt_number, check_run_id, new_run_id
from spotune.contracts.marks import read_mark
from spotune.contracts.records import AttemptRecord, Mark, RunRecord
from spotune.contracts.shapes import MOST_ATTEMPTS, plain
from spotune.contracts.store import Store
from spotune.guard.faults import last_event
from spotune.guard.machine import Machine
from spotune.guard.say import say


@dataclass(frozen=True)
class Request:
    """What the command line asked for; once ``run.json`` exists it counts only where a change is allowed."""

    config_path: str
    profile: str
    overrides: tuple[str, ...]
    allow_config_change: bool = False
    allow_env: tuple[str, ...] = ()


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
        say(f"{keys.run_id} is finished and certified already")
        return exits.SUCCEEDED
    for key in (keys.failed, keys.cancelled, keys.paused):
        if mark := read_mark(store, key):
            say(
                f"{keys.run_id} stands still since attempt {mark.attempt}: {mark.reason} (spotune resume {keys.run_id})"
            )
            return mark.exit_code
    return None


def check_data(run: RunRecord) -> None:
    """Raises InputError when the training data is not what the record in force says."""
    files = data_files(run.config, run.config_path)
    if data_sha256(run.config, files) != run.data_sha256:
        changed = few(changed_files(run.data_files, files, "url") or ("its fingerprint",))
        what = f"training data changed since the run began: {changed}"
        raise InputError(run.config_path, what, key="data", remedy=_remedy(run))


def check_model(run: RunRecord, cache: Path | None = None) -> None:
    """Raises InputError when the base model is not what the record in force says; may read all of it.

    ``cache``: this machine's folder for hashes of large files. A record without a fingerprint says nothing.
    """
    if not run.model_sha256:
        return
    files = model_files(run.config, run.config_path, cache)
    if model_sha256(files) == run.model_sha256:
        return
    key = "model_name_or_path"
    if any("sha256" in file for file in run.model_files) and not any("sha256" in file for file in files):
        raise InputError(
            run.config_path, f"no folder {run.config[key]} on this machine", key=key, remedy="put it there"
        )
    changed = few(changed_files(run.model_files, files, "name") or ("its fingerprint",))
    raise InputError(run.config_path, f"model changed since the run began: {changed}", key=key, remedy=_remedy(run))


def _remedy(run: RunRecord) -> str:
    return f"put it back, or spotune resume {run.run_id} {FLAG}"


def claim_attempt(
    store: Store, keys: Keys, machine: Machine, at_least: int = 1, gpu_share: float = 0.0
) -> AttemptRecord:
    """Claims the next attempt number, create-only: of two machines only one gets it, the other the next.

    Args:
        at_least: the engine's own count, which is ahead where a machine was lost before it could claim.
        gpu_share: GPUs of each node that it asked a shared cluster for; 0: not said.
    """
    attempt = max(latest_attempt(store, keys), at_least - 1)
    spells_s = earlier_spells(store, keys, attempt)
    while True:
        attempt += 1
        if attempt > MOST_ATTEMPTS:
            raise InputError(keys.attempts, f"claims {MOST_ATTEMPTS} attempts", remedy="remove what no machine claimed")
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
            gpu_share=gpu_share,
            spells_s=spells_s,
        )
        # Read back: a store without conditional puts (some emulators) lets both writers think that they won.
        try:
            if (
                store.create(keys.attempt(attempt), record.to_bytes())
                and store.read(keys.attempt(attempt)) == record.to_bytes()
            ):
                return record
        except Misplaced as error:  # a link or a file in the place of the attempt's folder
            say(f"attempt {attempt} cannot be claimed, the next one is: {error}")


def earlier_spells(store: Store, keys: Keys, attempt: int) -> list[float]:
    """How long the run's machines up to this attempt lasted, seconds, of those that were taken away.

    Each attempt's record has those before it; its own end is in its events, or is their last.
    """
    try:
        data = store.read(keys.attempt(attempt)) if attempt else None
        record = AttemptRecord.from_bytes(data, keys.attempt(attempt)) if data is not None else None
    except BadRecord as error:
        say(f"how long earlier machines lasted is not known: {error}")
        return []
    if record is None:
        return []
    last = last_event(store, keys, attempt)
    if not last or (last.get("event") == "end" and last.get("reason") != "preempted"):
        return record.spells_s
    return [*record.spells_s, round(max(0.0, float(last.get("t", 0.0)) - record.claimed_at), 1)]


def latest_attempt(store: Store, keys: Keys) -> int:
    """The highest attempt number claimed so far, 0 when there is none. A folder with an odd name claims nothing."""
    return max((number for name in store.folders(keys.attempts) if (number := attempt_number(name))), default=0)


def check_fence(store: Store, keys: Keys, attempt: int) -> None:
    """Raises Fenced when a later attempt has claimed the run: this machine was given up for lost."""
    latest = latest_attempt(store, keys)
    if latest > attempt:
        raise Fenced(f"attempt {attempt} of {keys.run_id} is fenced off: attempt {latest} has taken over")


def leave_mark(store: Store, key: str, run_id: str, attempt: int, **facts: Any) -> None:
    """Writes ``failed.json`` or its like, once; ``facts``: reason, exit_code, step."""
    facts["reason"] = plain(facts["reason"])  # it may name a file whose name is not UTF-8
    store.create(key, Mark(run_id=run_id, attempt=attempt, at=time.time(), **facts).to_bytes())
