"""Extras after the certificate, if the config asks for them: merge, push, wandb.

Each is a process on the worker's side, which the guard starts and watches. When it is done the guard writes a mark to
the bucket, create-only. An extra without a mark is pending: the next attempt starts it again, and does nothing else.
The run stays SUCCEEDED whatever becomes of its extras.
"""

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
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from spotune.core import errors, protocol
from spotune.core.environment import BUCKET, GUARD_PID, RUN_ID, parse_stall_after
from spotune.core.errors import BadRecord, Fenced, InfraError, Misplaced, SpotuneError, StoreError
from spotune.core.io import Damaged, failpoint, load_as
from spotune.core.keys import Keys, attempt_of
from spotune.core.records import Certificate, Progress, Record, RunRecord
from spotune.core.revisions import record_in_force
from spotune.core.store import Store
from spotune.guard import ranks
from spotune.guard.claim import check_fence, check_model
from spotune.guard.finish import certificate_of, fetch_result, send, weights_of
from spotune.guard.journal import Clock, Context, Journal, log
from spotune.guard.leaving import Notices, is_person
from spotune.guard.ranks import collect_stacks, upload_stacks, worker_command
from spotune.guard.stalls import Sample, SeenTime, Stalls, boot_time, sample_every_s

TIMEOUT_S = 3600.0
PAUSE_S = 15.0  # between two tries at a bucket that is away
LEAVE_S = 5.0  # extras end so long before the machine goes

Result = TypeVar("Result")


def run_extra(
    name: str,
    folder: Path,
    config: Mapping[str, Any],
    environ: Mapping[str, str],
    wait: Callable[[float], None],
    fault: Callable[[int], str] = lambda pid: "",
    timeout_s: float = TIMEOUT_S,
    clock: Clock = time.monotonic,
) -> protocol.ExtraResult:
    """Runs an extra to its end; kills it if ``wait`` raises or ``fault`` names a fault of its process id."""
    protocol.answer_path(folder, name).unlink(missing_ok=True)
    quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
    if not sys.stderr.isatty():  # in a log, progress bars are endless lines
        quiet["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    of_run = {key: str(value) for key, value in (config.get("env") or {}).items()}
    process = subprocess.Popen(
        worker_command(environ, "spotune.sft.extras", name, str(folder)),
        env={**quiet, **environ, **of_run, GUARD_PID: str(os.getpid())},
        stdin=subprocess.DEVNULL,
        process_group=0,
    )
    deadline = clock() + timeout_s
    try:
        while process.poll() is None:
            if clock() > deadline:
                return protocol.ExtraResult(False, f"not done after {timeout_s:.0f} s")
            if what := fault(process.pid):
                return protocol.ExtraResult(False, what)
            wait(0.1)
    finally:
        _kill(process)
    if answer := _read_answer(folder, name):
        return answer
    code = process.returncode
    died = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return protocol.ExtraResult(False, f"its process {died} without a word")


def _read_answer(folder: Path, name: str) -> protocol.ExtraResult | None:
    """Returns the process's answer, None if it left none. A damaged answer means that the extra is not done."""
    path = protocol.answer_path(folder, name)
    try:
        answer = load_as(path, protocol.ExtraResult)
    except (Damaged, InfraError) as error:
        return protocol.ExtraResult(False, f"its process left a damaged {path.name}: {error}")
    if missing := [fact for fact in protocol.FACTS[name] if answer and answer.done and fact not in answer.facts]:
        return protocol.ExtraResult(False, f"its process left a damaged {path.name}: facts: {missing[0]}: missing")
    return answer


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """Kills the process and its children; returns when it is gone."""
    with suppress(ProcessLookupError, PermissionError):  # macOS says the latter of a zombie
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class ExtraWatch:
    """The watchdog of one extra's process group: detects that it neither computes nor moves bytes."""

    def __init__(self, context: Context, clock: Clock = time.monotonic, boot: Clock = boot_time) -> None:
        self._context, self._floor_s = context, parse_stall_after(context.run.stall_after)
        self._stalls = Stalls(self._floor_s, context.patience_s)
        self._stalls.on_event({"event": "phase", "phase": "extra"})
        self._time = SeenTime(clock, boot)
        self._sampled_s: float | None = None

    def fault(self, pid: int) -> str:
        """Returns what is wrong with the process, after recording its stacks; empty for nothing."""
        self._stalls.forgive(self._time.tick())
        now, sample = self._time.seen_s, None
        if self._sampled_s is None or now - self._sampled_s >= sample_every_s(self._floor_s):
            self._sampled_s, sample = now, Sample(ranks.work_of({pid}), ranks.own_work())
        if (stall := self._stalls.check(now, sample)) is None:
            return ""
        context = self._context
        collect_stacks(context.folder, {0: pid})
        upload_stacks(context.store, context.keys, context.attempt, context.folder)
        place = f"{context.store.url}/{context.keys.stacks(context.attempt, 0)}"
        silent = f"nothing done for {stall.silent_s:.0f} s (limit {stall.limit_s:.0f} s)"
        return f"its process hangs: {silent}; stacks: {place}"


class TakenAway(Exception):
    """The machine goes: the next attempt does the extras that have no mark."""


def pending_extras(store: Store, keys: Keys) -> tuple[RunRecord, tuple[str, ...]] | None:
    """Returns the record and the names of the pending extras of a certified run, None if none is pending."""
    run = record_in_force(store, keys)
    marks = {protocol.MERGE: keys.merge_completed, protocol.PUSH: keys.pushed}
    names = tuple(name for name in protocol.asked_for(run.config) if not store.exists(marks[name])) if run else ()
    return (run, names) if run and names else None


class Extras:
    """The extras of one attempt. ``failures``: a line for each that is still pending."""

    def __init__(
        self,
        context: Context,
        certificate: Certificate,
        notices: Notices,
        journal: Journal,
        clock: Clock = time.monotonic,
    ) -> None:
        self._clock, self._fence = clock, partial(check_fence, context.store, context.keys, context.attempt)
        self.context, self.certificate, self.notices, self.journal = context, certificate, notices, journal
        self.failures: list[str] = []
        self._has_logged_notice = False

    def run(self, names: Iterable[str]) -> bool:
        """Does extras one after the other; returns whether there was time for all, well or not. Raises nothing."""
        for name in names:
            try:
                self._fetch()
                self._merge() if name == protocol.MERGE else self._push()
            except TakenAway:
                log(f"{protocol.CONFIG_KEYS[name]} is pending: the machine goes; the next attempt does it")
                return False
            except Fenced as fenced:
                self.failures.append(str(fenced))
                log(f"{protocol.CONFIG_KEYS[name]}: {fenced}")
                return True
            except (SpotuneError, OSError) as error:
                again = f"{BUCKET}={self.context.store.url} {RUN_ID}={self.context.keys.run_id} python -m spotune.sft"
                self.failures.append(f"{protocol.CONFIG_KEYS[name]} is pending: {error}")
                log(f"{self.failures[-1]}; the run is finished all the same; to do what is pending: {again}")
        return True

    def _fetch(self) -> None:
        """Downloads the certified result unless this machine made it."""
        context, target = self.context, self.context.folder / protocol.OUTPUT
        if target.exists():
            return
        part = target.with_name(".part-output")
        self.journal.write("phase", phase="restore")
        self._patiently(lambda: fetch_result(context.store, context.keys, self.certificate, part))
        part.rename(target)
        self.journal.write("phase", phase="teardown")

    def _merge(self) -> None:
        context, keys, folder = self.context, self.context.keys, self.context.folder / protocol.MERGED
        check_model(context.run, context.cache)  # the base may have changed, or be missing on this machine
        facts = self._process(protocol.MERGE)
        failpoint("merged")

        def uploaded() -> None:
            failpoint("merged-uploaded")
            self._check_notice()

        def upload() -> Certificate:
            self._fence()
            weights = weights_of(keys, folder)
            files = send(context.store, folder, keys.merged, self._fence, uploaded)
            return certificate_of(keys, context.attempt, self.certificate.step, weights, files)

        self._mark(keys.merge_completed, self._patiently(upload))
        log(f"merged model: {context.store.url}/{keys.merged}: {facts['check']}")

    def _push(self) -> None:
        facts = self._process(protocol.PUSH)
        failpoint("pushed")
        names: dict[str, Any] = {name: facts[name] for name in protocol.FACTS[protocol.PUSH]}
        record = protocol.Pushed(run_id=self.context.keys.run_id, attempt=self.context.attempt, at=time.time(), **names)
        self._mark(self.context.keys.pushed, record)
        log(f"pushed to the hub: {record.url}")

    def _process(self, name: str) -> dict[str, str]:
        """Runs an extra's process and returns its facts. Raises SpotuneError, with the reason, if it failed."""
        context, certificate = self.context, self.certificate
        self._fence()
        job = protocol.ExtraJob(context.keys.run_id, certificate.step, certificate.weights_sha256, context.run.config)
        protocol.write_json(context.folder / protocol.EXTRAS, job)
        fault = ExtraWatch(context, self._clock).fault
        answer = run_extra(name, context.folder, job.config, context.environ, self._wait, fault)
        if not answer.done:
            raise SpotuneError(answer.message)
        return answer.facts

    def _mark(self, key: str, record: Record) -> None:
        def mark() -> None:
            self._fence()
            self.context.store.create(key, record.to_bytes())

        self._patiently(mark)

    def _patiently(self, work: Callable[[], Result]) -> Result:
        """Retries while the bucket is away, for ``patience_s`` at most. Raises at once what only people can mend."""
        deadline = self._clock() + self.context.patience_s
        while True:
            try:
                return work()
            except StoreError as error:
                if self._clock() > deadline or isinstance(error, Misplaced):
                    raise
                log(f"tried again in {PAUSE_S:.0f} s: {error}")
                self._wait(PAUSE_S)

    def _wait(self, seconds: float) -> None:
        if self.notices.wait(seconds):
            self._check_notice()

    def _check_notice(self) -> None:
        """Raises TakenAway once there is no time left."""
        if not self.notices.given:
            return
        source, left_s = self.notices.source, self.notices.left_s
        if not self._has_logged_notice:
            self._has_logged_notice = True
            self.journal.write("notice", source=source, grace_s=round(left_s, 1))
            log(f"{source}: the result is certified, extras go on while there is time")
        if is_person(source) or left_s < LEAVE_S:
            raise TakenAway


def finish_extras(context: Context, notices: Notices, pending: tuple[str, ...]) -> int:
    """Does the pending extras of a certified run; returns 0 however they went, or 75 if the machine goes first."""
    keys, folder = context.keys, context.folder
    named = ", ".join(protocol.CONFIG_KEYS[name] for name in pending)
    log(f"{keys.run_id}: pending extras: {named}; attempt {context.attempt} does only these")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        progress = Progress(run_id=keys.run_id, attempt=context.attempt)
        with suppress(BadRecord):  # a broken heartbeat costs nothing else
            data = context.store.read(keys.progress)
            progress = Progress.from_bytes(data, keys.progress) if data else progress
        progress = replace(progress, attempt=context.attempt, at=time.time())  # its steps do not go back to 0
        certificate = Certificate.from_bytes(context.store.read(keys.completed) or b"", keys.completed)
    except SpotuneError as error:
        log(f"{named}: still pending: {error}")
        return errors.SUCCEEDED
    journal = Journal.of(context, progress)
    journal.write("phase", phase="teardown")
    extras = Extras(context, certificate, notices, journal)
    in_time = extras.run(pending)
    code = errors.SUCCEEDED if in_time else errors.PREEMPTED
    journal.end("completed" if in_time else "preempted", code, certificate.step, "; ".join(extras.failures))
    shutil.rmtree(folder, ignore_errors=True)
    return code


def tracker_environ(run: RunRecord, environ: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables by which wandb continues one run over all attempts; keeps what the user has set."""
    if protocol.wandb_mode(run.config, environ) != "live":
        return {}
    wanted = {"WANDB_RUN_ID": run.run_id, "WANDB_RESUME": "allow", "WANDB_NAME": run.run_id}
    return {name: environ.get(name, value) for name, value in wanted.items()}


def rebuild_offline(store: Store, keys: Keys, run: RunRecord, environ: Mapping[str, str]) -> None:
    """Writes the run as one offline wandb run to ``runs/<id>/wandb/``, from our events. Only logs a failure."""
    if protocol.wandb_mode(run.config, environ) != "rebuild":
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spec = {"run_id": run.run_id, "config": run.config, "logs": surviving_logs(store, keys)}
        (folder / "run.json").write_text(json.dumps(spec, default=str))
        command = worker_command(environ, "spotune.sft.extras", "wandb", str(folder))
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=dict(environ))
            if done.returncode:
                raise OSError((done.stderr.strip().splitlines() or ["no reason given"])[-1])
            for path in list((folder / "wandb").rglob("*")):
                if path.is_file() and not path.is_symlink():
                    store.upload(path, f"{keys.root}/{path.relative_to(folder).as_posix()}")
        except (subprocess.TimeoutExpired, StoreError, OSError) as error:
            log(f"wandb's offline run is not written: {error}")
            return
    log(f"wandb, offline: {store.url}/{keys.root}/wandb (wandb sync <a copy of offline-run-*>)")


def surviving_logs(store: Store, keys: Keys) -> list[dict[str, object]]:
    """Returns Trainer's log lines of all attempts by step; for a step done twice the last attempt's line."""
    logs: dict[tuple[int, bool], tuple[int, dict[str, object]]] = {}
    for key in store.keys(keys.attempts):
        attempt = attempt_of(key)
        if attempt is None or "/events-0-" not in key:
            continue
        for event in protocol.parse_objects(store.read(key) or b""):
            if event.get("event") == "log" and (step := protocol.number(event.get("step"))) is not None:
                slot = (int(step), any(name.startswith("eval_") for name in event))
                if slot not in logs or logs[slot][0] <= attempt:
                    logs[slot] = (attempt, {name: value for name, value in event.items() if name != "event"})
    return [fields for _, (_, fields) in sorted(logs.items())]
