"""Extras after the certificate: merge, push, wandb. Each is a process that the guard starts and watches."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from spotune.core import errors, protocol
from spotune.core.environment import BUCKET, GUARD_PID, RUN_ID, parse_stall_after
from spotune.core.errors import BadRecord, Fenced, InfraError, Misplaced, SpotuneError, StoreError
from spotune.core.io import Damaged, failpoint, load_as
from spotune.core.keys import Keys, attempt_of
from spotune.core.protocol import (
    CONFIG_KEYS,
    EXTRAS,
    FACTS,
    MERGE,
    MERGED,
    OUTPUT,
    PUSH,
    Answer,
    ExtraJob,
    Pushed,
    answer_path,
    asked_for,
    number,
    parse_objects,
    wandb_mode,
    write_json,
)
from spotune.core.records import Certificate, Progress, Record, RunRecord
from spotune.core.revisions import record_in_force
from spotune.core.store import Store
from spotune.guard import ranks
from spotune.guard.claim import check_fence, check_model
from spotune.guard.finish import certificate_of, fetch_result, send, weights_of
from spotune.guard.journal import Context, Journal, say
from spotune.guard.leaving import Notices, is_person
from spotune.guard.ranks import collect_stacks, upload_stacks, worker_command
from spotune.guard.stalls import Budgets, Sample, SeenTime, Stalls, boot_time, sample_every_s

# The process that does one extra: started, watched and ended by the guard, like a rank.

POLL_S = 0.1
TIMEOUT_S = 3600.0


def run_extra(
    name: str,
    folder: Path,
    config: Mapping[str, Any],
    environ: Mapping[str, str],
    wait: Callable[[float], None],
    fault: Callable[[int], str] = lambda pid: "",
    timeout_s: float = TIMEOUT_S,
    clock: Callable[[], float] = time.monotonic,
) -> Answer:
    """Runs ``python -m spotune.sft.extras NAME FOLDER`` to its end; whatever ``wait`` raises ends it at once.

    ``fault``: what is wrong with the process of that id; empty where nothing is.
    """
    answer_path(folder, name).unlink(missing_ok=True)
    process = subprocess.Popen(
        worker_command(environ, "spotune.sft.extras", name, str(folder)),
        env={**extra_environ(config, environ), GUARD_PID: str(os.getpid())},
        stdin=subprocess.DEVNULL,
        process_group=0,
    )
    deadline = clock() + timeout_s
    try:
        while process.poll() is None:
            if clock() > deadline:
                return Answer(False, f"not done after {timeout_s:.0f} s")
            if what := fault(process.pid):
                return Answer(False, what)
            wait(POLL_S)
    finally:
        _kill(process)
    if answer := _read_answer(folder, name):
        return answer
    code = process.returncode
    died = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return Answer(False, f"its process {died} without a word")


def _read_answer(folder: Path, name: str) -> Answer | None:
    """The process's answer, None where it left none; a damaged one means that it is not done."""
    path = answer_path(folder, name)
    try:
        answer = load_as(path, Answer)
    except (Damaged, InfraError) as error:
        return Answer(False, f"its process left a damaged {path.name}: {error}")
    if missing := [fact for fact in FACTS[name] if answer and answer.done and fact not in answer.facts]:
        return Answer(False, f"its process left a damaged {path.name}: facts: {missing[0]}: missing")
    return answer


def extra_environ(config: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, str]:
    """The run's environment, as its ranks had it; in a log, progress bars are lines without end."""
    quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
    if not sys.stderr.isatty():
        quiet |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return quiet | dict(environ) | {key: str(value) for key, value in (config.get("env") or {}).items()}


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """SIGKILL to the process and its children; returns when it is gone."""
    with suppress(ProcessLookupError, PermissionError):  # macOS says the latter of a zombie
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# Notices the process of an extra that hangs: it neither computes nor moves bytes. What the watchdog is for ranks.


class ExtraWatch:
    """Watches one process, which leads a process group."""

    def __init__(
        self,
        context: Context,
        clock: Callable[[], float] = time.monotonic,
        boot: Callable[[], float] = boot_time,
    ) -> None:
        self._context = context
        self._floor_s = parse_stall_after(context.run.stall_after)
        self._stalls = Stalls(Budgets(self._floor_s, context.patience_s))
        self._stalls.take({"event": "phase", "phase": "extra"})
        self._time = SeenTime(clock, boot)
        self._sampled_s: float | None = None

    def fault(self, pid: int) -> str:
        """What is wrong with the process, once its stacks are recorded; empty where nothing is."""
        self._stalls.forgive(self._time.tick())
        now, sample = self._time.seen_s, None
        if self._sampled_s is None or now - self._sampled_s >= sample_every_s(self._floor_s):
            self._sampled_s, sample = now, Sample(ranks.work_of({pid}), ranks.own_work())
        stall = self._stalls.look(now, sample)
        if stall is None:
            return ""
        context = self._context
        collect_stacks(context.folder, {0: pid})
        upload_stacks(context.store, context.keys, context.attempt, context.folder)
        place = f"{context.store.url}/{context.keys.stacks(context.attempt, 0)}"
        return (
            f"its process hangs: nothing done for {stall.silent_s:.0f} s (limit {stall.limit_s:.0f} s); stacks: {place}"
        )


# After the certificate: the adapter merged into its base, the result pushed to the hub, where the config asks for it.
#
# Each extra is done by a process of its own on the worker's side of seam 2, and has a mark in the bucket once it is
# done, create-only. Without the mark it is owed: the next attempt does it from its start, and nothing else. Whatever
# becomes of extras, the run stays SUCCEEDED.

PAUSE_S = 15.0  # between two tries at a bucket that is away
LEAVE_S = 5.0  # an extra may go on until so shortly before the machine goes

Result = TypeVar("Result")


class TakenAway(Exception):
    """The machine goes: what has no mark yet is left to the next attempt."""


class Debt(NamedTuple):
    """What a certified run owes, by name."""

    run: RunRecord
    names: tuple[str, ...]


def debt_of(store: Store, keys: Keys) -> Debt | None:
    """The extras that the config of a certified run asks for and that have no mark, None when there is none."""
    run = record_in_force(store, keys)
    marks = {MERGE: keys.merge_completed, PUSH: keys.pushed}
    names = tuple(name for name in asked_for(run.config) if not store.exists(marks[name])) if run else ()
    return Debt(run, names) if run and names else None


class Extras:
    """The extras of one attempt. ``failures``: a line for each that is still owed."""

    def __init__(
        self,
        context: Context,
        certificate: Certificate,
        notices: Notices,
        journal: Journal,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self.context, self.certificate, self.notices, self.journal = context, certificate, notices, journal
        self.failures: list[str] = []
        self._is_notice_said = False

    def run(self, names: Iterable[str]) -> bool:
        """Does them one after the other; returns whether there was time for all, well or not. Raises nothing."""
        for name in names:
            try:
                self._fetch()
                self._merge() if name == MERGE else self._push()
            except TakenAway:
                say(f"{CONFIG_KEYS[name]} is owed: the machine goes; the next attempt does it")
                return False
            except Fenced as fenced:
                self.failures.append(str(fenced))
                say(f"{CONFIG_KEYS[name]}: {fenced}")
                return True
            except (SpotuneError, OSError) as error:
                self._owe(CONFIG_KEYS[name], error)
        return True

    def _owe(self, key: str, error: Exception) -> None:
        again = f"{BUCKET}={self.context.store.url} {RUN_ID}={self.context.keys.run_id} python -m spotune.sft"
        self.failures.append(f"{key} is owed: {error}")
        say(f"{self.failures[-1]}; the run is finished all the same, and this does what is owed: {again}")

    def _fetch(self) -> None:
        """Brings the certified result to this machine where it is not the one that made it."""
        context, target = self.context, self.context.folder / OUTPUT
        if target.exists():
            return
        part = target.with_name(".part-output")
        self.journal.write("phase", phase="restore")
        self._patiently(lambda: fetch_result(context.store, context.keys, self.certificate, part))
        part.rename(target)
        self.journal.write("phase", phase="teardown")

    def _merge(self) -> None:
        context, keys, folder = self.context, self.context.keys, self.context.folder / MERGED
        check_model(context.run, context.cache)  # the base may have changed since, or not be on this machine
        facts = self._process(MERGE)
        failpoint("merged")

        def uploaded() -> None:
            failpoint("merged-uploaded")
            self._heed()

        def upload() -> Certificate:
            self._fence()
            weights = weights_of(keys, folder)
            files = send(context.store, folder, keys.merged, self._fence, uploaded)
            return certificate_of(keys, context.attempt, self.certificate.step, weights, files)

        self._mark(keys.merge_completed, self._patiently(upload))
        say(f"merged model: {context.store.url}/{keys.merged}: {facts['check']}")

    def _push(self) -> None:
        facts = self._process(PUSH)
        failpoint("pushed")
        record = Pushed(
            run_id=self.context.keys.run_id,
            attempt=self.context.attempt,
            repo_id=facts["repo_id"],
            oid=facts["oid"],
            url=facts["url"],
            at=time.time(),
        )
        self._mark(self.context.keys.pushed, record)
        say(f"pushed to the hub: {record.url}")

    def _process(self, name: str) -> dict[str, str]:
        """What the process that does the extra says of it. Raises SpotuneError, with its reason, when it failed."""
        context, certificate = self.context, self.certificate
        self._fence()
        job = ExtraJob(context.keys.run_id, certificate.step, certificate.weights_sha256, context.run.config)
        write_json(context.folder / EXTRAS, job)
        answer = run_extra(
            name, context.folder, job.config, context.environ, self._wait, ExtraWatch(context, self._clock).fault
        )
        if not answer.done:
            raise SpotuneError(answer.message)
        return answer.facts

    def _mark(self, key: str, record: Record) -> None:
        def mark() -> None:
            self._fence()
            self.context.store.create(key, record.to_bytes())

        self._patiently(mark)

    def _fence(self) -> None:
        check_fence(self.context.store, self.context.keys, self.context.attempt)

    def _patiently(self, work: Callable[[], Result]) -> Result:
        """Does it again while the bucket is away, for as long as it may be. What only people can mend is raised."""
        deadline = self._clock() + self.context.patience_s
        while True:
            try:
                return work()
            except StoreError as error:
                if self._clock() > deadline or isinstance(error, Misplaced):
                    raise
                say(f"tried again in {PAUSE_S:.0f} s: {error}")
                self._wait(PAUSE_S)

    def _wait(self, seconds: float) -> None:
        if self.notices.wait(seconds):
            self._heed()

    def _heed(self) -> None:
        """Raises TakenAway once there is no time left for anything."""
        if not self.notices.given:
            return
        source, left_s = self.notices.source, self.notices.left_s
        if not self._is_notice_said:
            self._is_notice_said = True
            self.journal.write("notice", source=source, grace_s=round(left_s, 1))
            say(f"{source}: the result is certified, extras go on while there is time")
        if is_person(source) or left_s < LEAVE_S:
            raise TakenAway


# An attempt on a run that is certified already and still owes extras: it does these, and nothing else.


def finish_owed(context: Context, notices: Notices, owed: tuple[str, ...]) -> int:
    """Does what is owed; returns 0, however that went, or 75 when the machine goes before it is through."""
    keys, folder = context.keys, context.folder
    named = ", ".join(CONFIG_KEYS[name] for name in owed)
    say(f"{keys.run_id} owes {named}: attempt {context.attempt} does that alone")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        shown = _shown(context)
        certificate = Certificate.from_bytes(context.store.read(keys.completed) or b"", keys.completed)
    except SpotuneError as error:
        say(f"{named}: still owed: {error}")
        return errors.SUCCEEDED
    log = protocol.events_path(folder, 0)
    journal = Journal(context.store, keys, context.attempt, log, context.status_file, shown)
    journal.write("start", attempt=context.attempt, host=context.record.host, world_size=context.machine.world_size)
    journal.write("phase", phase="teardown")
    extras = Extras(context, certificate, notices, journal)
    in_time = extras.run(owed)
    code = errors.SUCCEEDED if in_time else errors.PREEMPTED
    reason, message = "completed" if in_time else "preempted", "; ".join(extras.failures)
    journal.write("end", reason=reason, exit_code=code, step=certificate.step, message=message)
    try:
        journal.close()
    except SpotuneError as error:
        say(f"the last events are not recorded: {error}")
    shutil.rmtree(folder, ignore_errors=True)
    return code


def _shown(context: Context) -> Progress:
    """What could be seen of the run last: its steps do not go back to 0."""
    key = context.keys.progress
    seen = Progress(run_id=context.keys.run_id, attempt=context.attempt)
    with suppress(BadRecord):  # a broken heartbeat costs nothing else
        data = context.store.read(key)
        seen = Progress.from_bytes(data, key) if data else seen
    return replace(seen, attempt=context.attempt, at=time.time())


# wandb from the guard's side: one run id across attempts; offline, one clean run rebuilt from our events.

REBUILD_S = 300


def tracker_environ(run: RunRecord, environ: Mapping[str, str]) -> dict[str, str]:
    """What makes wandb continue one run over all attempts; what the user has set stays."""
    if wandb_mode(run.config, environ) != "live":
        return {}
    wanted = {"WANDB_RUN_ID": run.run_id, "WANDB_RESUME": "allow", "WANDB_NAME": run.run_id}
    return {name: environ.get(name, value) for name, value in wanted.items()}


def rebuild_offline(store: Store, keys: Keys, run: RunRecord, environ: Mapping[str, str]) -> None:
    """Writes the run as one offline wandb run to ``runs/<id>/wandb/``; a failure is said, the result stands."""
    if wandb_mode(run.config, environ) != "rebuild":
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spec = {"run_id": run.run_id, "config": run.config, "logs": surviving_logs(store, keys)}
        (folder / "run.json").write_text(json.dumps(spec, default=str))
        command = worker_command(environ, "spotune.sft.extras", "wandb", str(folder))
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=REBUILD_S, env=dict(environ))
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
                say(f"wandb's offline run is not written: {reason}")
                return
            files = [path for path in (folder / "wandb").rglob("*") if path.is_file() and not path.is_symlink()]
            for path in files:
                store.upload(path, f"{keys.root}/{path.relative_to(folder).as_posix()}")
        except (subprocess.TimeoutExpired, StoreError, OSError) as error:
            say(f"wandb's offline run is not written: {error}")
            return
    say(f"wandb, offline: {store.url}/{keys.root}/wandb (wandb sync <a copy of offline-run-*>)")


def surviving_logs(store: Store, keys: Keys) -> list[dict[str, object]]:
    """Trainer's log lines of all attempts in order of steps; of a step done twice the last attempt's counts."""
    logs: dict[tuple[int, bool], tuple[int, dict[str, object]]] = {}
    for key in store.keys(keys.attempts):
        attempt = attempt_of(key)
        if attempt is None or "/events-0-" not in key:
            continue
        for event in parse_objects(store.read(key) or b""):
            if event.get("event") == "log" and (step := number(event.get("step"))) is not None:
                slot = (int(step), any(name.startswith("eval_") for name in event))
                if slot not in logs or logs[slot][0] <= attempt:
                    logs[slot] = (attempt, {name: value for name, value in event.items() if name != "event"})
    return [fields for _, (_, fields) in sorted(logs.items())]
