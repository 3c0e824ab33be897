"""One attempt: run the ranks, commit what they save, and say how it ended. What happens meanwhile is in watch.py."""

import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from spotune.core import exits, protocol
from spotune.core.environment import parse_save_every
from spotune.core.errors import Fenced, InputError, Misplaced, SpotuneError, StoreError
from spotune.core.protocol import EndReason, Job, Outcome, asked_for
from spotune.core.records import Certificate, Commit, RunRecord
from spotune.core.revisions import record_history
from spotune.guard import claim
from spotune.guard.checkpoints import sealed
from spotune.guard.claim import for_people
from spotune.guard.context import Context
from spotune.guard.extras import Extras, rebuild_offline, tracker_environ
from spotune.guard.finish import certify, copy_output
from spotune.guard.journal import GpuMeter, Journal, say
from spotune.guard.leaving import Notices
from spotune.guard.multinode import Leader, gang_token
from spotune.guard.ranks import Ranks, free_port
from spotune.guard.restore import FAULTS, is_second_fault, newest_commit
from spotune.guard.restore_thread import Restoring
from spotune.guard.save_schedule import Toll
from spotune.guard.stacks import upload_stacks
from spotune.guard.stalls import sample_every_s
from spotune.guard.watch import Watch
from spotune.guard.watchdog import Watchdog

CERTIFY_PAUSE_S = 15.0
HANGING_S = 30.0  # what the end of a stalled attempt waits for a bucket that may not answer
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")

Result = TypeVar("Result")
Ending = tuple[int, EndReason, str]  # exit code, reason for the report, one line for people


class Attempt:
    """Everything that one attempt owns; ``run`` returns the exit code.

    Args:
        clock: seconds that never go back.
    """

    def __init__(self, context: Context, notices: Notices, clock: Callable[[], float] = time.monotonic) -> None:
        self.context, self.notices, self._clock = context, notices, clock
        shutil.rmtree(context.folder, ignore_errors=True)
        (context.folder / protocol.STAGED).mkdir(parents=True)
        log = protocol.events_path(context.folder, 0)
        self.journal = Journal(context.store, context.keys, context.attempt, log, context.status_file)
        size = context.machine.world_size
        self.journal.write("start", attempt=context.attempt, host=context.record.host, world_size=size)
        token = gang_token(context.keys.run_id, context.environ.get("SKYPILOT_TASK_ID", ""))
        self.leader = Leader(context.keys.run_id, context.machine, token)
        self.watch: Watch | None = None
        self.watchdog: Watchdog | None = None
        self._newest: Commit | None = None
        self._refused_versions: list[str] = []
        self._ending: Ending | None = None
        self._is_certified = False

    def run(self) -> int:
        """Trains to an end or to a notice; leaves the attempt's last event and, at a bad end, failed.json."""
        try:
            code, reason, message = self._train()
        except InputError as error:
            code, reason, message = error.exit_code, "failed", str(error)
        except SpotuneError as error:
            code, reason, message = error.exit_code, self._reason_of(error), str(error)
        except (OSError, MemoryError) as error:  # of this machine: those of the bucket have their own name
            code, reason, message = exits.PREEMPTED, "failed", f"this machine: {error}"
        if code == exits.PREEMPTED and reason in FAULTS and self._is_second_fault():
            code, message = exits.FAILED, f"two attempts in a row failed and committed nothing: {message}"
        if code in (exits.FAILED, exits.BAD_INPUT):
            self._mark_failed(code, message)
        if message:
            say(message, bare=True)
        self._ending = code, reason, message
        self._close(code, reason, message)
        return code

    def end_stalled(self, message: str) -> int:
        """Ends the attempt in the place of the main thread, which hangs; returns the exit code.

        What the main thread has decided stands. No call to the bucket is waited for longer than ``HANGING_S``.
        """
        code, reason = self._stalled_end()
        say(message, bare=True)
        self.journal.write("end", reason=reason, exit_code=code, step=self.journal.progress.step, message=message)
        within(HANGING_S, lambda: self._record_stalled(code, message), None)
        self.leader.close(code)
        return code

    def _stalled_end(self) -> tuple[int, EndReason]:
        if self._ending:
            return self._ending[:2]
        if self._is_certified:
            return exits.SUCCEEDED, "completed"
        is_second = within(HANGING_S, self._is_second_fault, False)
        return exits.FAILED if is_second else exits.PREEMPTED, "stalled"

    def _record_stalled(self, code: int, message: str) -> None:
        if code == exits.FAILED and not self._ending:
            self._mark_failed(code, message)
        upload_stacks(self.context.store, self.context.keys, self.context.attempt, self.context.folder)
        self.journal.close()

    def _is_second_fault(self) -> bool:
        try:
            return is_second_fault(self.context.store, self.context.keys, self.context.attempt)
        except StoreError:  # then that is the fault, and no other is known of
            return False

    def _reason_of(self, error: SpotuneError) -> EndReason:
        if isinstance(error, Fenced):
            return "lost"
        return "preempted" if self.notices.given else "failed"

    def _train(self) -> Ending:
        context = self.context
        self._newest = newest_commit(context.store, context.keys)
        toll = Toll(self._newest.saving if self._newest else None)
        self.journal.listen(toll.take)
        with for_people(context.keys):
            history = record_history(context.store, context.keys)
        job = make_job(context, self._newest, history)
        protocol.write_json(context.folder / protocol.JOB, job)
        watch = self.watch = Watch(context, job, self.journal, self.leader, self.notices, toll)
        uploading, is_leaving = lambda: watch.uploading, lambda: self.notices.given
        dog = self.watchdog = Watchdog(
            context, self.journal, self.leader, toll, uploading, is_leaving, self.end_stalled
        )
        trackers, port = tracker_environ(context.run, context.environ), free_port()
        sample_s = sample_every_s(dog.floor_s) if dog.floor_s else 0.0
        self.leader.gather(self.notices, job=asdict(job), master_port=port, environ=trackers, sample_s=sample_s)
        ranks = Ranks(context.folder, context.machine, port, {**context.environ, **trackers})
        try:
            self.journal.write("phase", phase="load")
            dog.start(ranks.pids)
            with GpuMeter(context.machine.gpus, context.environ, self.journal):
                restoring = Restoring(context, self.journal, self.leader)
                try:
                    outcome = watch.until_ended(ranks, restoring, lambda: dog.stall)
                finally:
                    restoring.stop()
        finally:
            dog.stop(has_stalled=watch.stall is not None)
            ranks.kill()
        return self._conclude(watch, outcome)

    def _conclude(self, watch: Watch, outcome: Outcome) -> Ending:
        """From how the ranks ended to exit code, reason and message."""
        watch.finish_uploads()
        match outcome.how:
            case "completed":
                return self._complete(outcome)
            case "stopped" if self.notices.given:
                return exits.PREEMPTED, "preempted", ""
            case "stopped" if watch.wall.reached and not watch.why_stopped():
                return self._pause(watch)
            case "stopped":
                return exits.PREEMPTED, "failed", watch.why_stopped() or "training stopped without being asked to"
            case "retry" if self.watchdog and watch.stall:
                return exits.PREEMPTED, "stalled", self.watchdog.message
            case "retry":
                return exits.PREEMPTED, "preempted" if self.notices.given else "failed", outcome.message
            case "bad_input":
                self._refused_versions = outcome.versions
                return exits.BAD_INPUT, "failed", outcome.message
            case "failed":
                return exits.FAILED, "failed", outcome.message

    def _complete(self, outcome: Outcome) -> Ending:
        context = self.context
        self.journal.write("phase", phase="teardown")
        certificate = self._certify(outcome.step)
        self._is_certified = True
        say(f"{context.keys.run_id} is certified at step {certificate.step}: weights {certificate.weights_sha256[:16]}")
        if output_dir := context.run.config.get("output_dir"):
            self._copy_output(Path(output_dir))
        rebuild_offline(context.store, context.keys, context.run, context.environ)
        self.leader.close(exits.SUCCEEDED)  # what follows needs this machine only
        if not Extras(context, certificate, self.notices, self.journal).run(asked_for(context.run.config)):
            return exits.PREEMPTED, "preempted", ""
        return exits.SUCCEEDED, "completed", ""

    def _certify(self, step: int) -> Certificate:
        """Uploads and certifies the result, again and again while the bucket is away, for as long as it may be."""
        context = self.context
        deadline = self._clock() + context.patience_s
        while True:
            try:
                return certify(context.store, context.keys, context.attempt, step, context.folder)
            except StoreError as error:
                is_over = self._clock() > deadline or self.notices.left_s <= 0
                if is_over or isinstance(error, Misplaced):  # time does not mend that: people have to
                    kind = Misplaced if isinstance(error, Misplaced) else StoreError
                    raise kind(f"{error}; all {step} steps are made, the result is not in the bucket") from error
                say(f"the result is not certified yet: {error}")
                self.notices.wait(min(CERTIFY_PAUSE_S, self.notices.left_s))

    def _copy_output(self, target: Path) -> None:
        try:
            copy_output(self.context.folder, target, self.context.keys.run_id)
        except OSError as error:
            place = f"{self.context.store.url}/{self.context.keys.output}"
            say(f"output_dir {target}: the result is in {place}, not copied: {error}")

    def _pause(self, watch: Watch) -> Ending:
        """The mark comes first: where it cannot be left, the next attempt has to find the wall again."""
        step = watch.committer.committed_step if watch.committer else self._newest.step if self._newest else 0
        reason = watch.wall.reason(step)
        self._leave_mark(self.context.keys.paused, exits.PAUSED, reason, step)
        run_id = self.context.keys.run_id
        flag = "" if self.context.run.budget_usd is None else " --budget USD"
        return exits.PAUSED, "paused", f"{run_id} is paused: {reason} (spotune resume {run_id}{flag})"

    def _mark_failed(self, code: int, message: str) -> None:
        self.journal.poll()  # the ranks' last steps may not have been read yet
        step = self.journal.progress.step or (self._newest.step if self._newest else 0)
        try:
            self._leave_mark(self.context.keys.failed, code, message, step)
        except SpotuneError as error:
            say(str(error))

    def _leave_mark(self, key: str, code: int, reason: str, step: int) -> None:
        context = self.context
        facts = {"reason": reason, "exit_code": code, "step": step, "versions": self._refused_versions}
        claim.leave_mark(context.store, key, context.keys.run_id, context.attempt, **facts)

    def _close(self, code: int, reason: EndReason, message: str) -> None:
        if self.watch:
            self.watch.close()
        upload_stacks(self.context.store, self.context.keys, self.context.attempt, self.context.folder)
        self.journal.poll()
        self.journal.write("end", reason=reason, exit_code=code, step=self.journal.progress.step, message=message)
        try:
            self.journal.close()
        except SpotuneError as error:
            say(f"the last events are not recorded: {error}")
        self.leader.close(code)
        if self.watchdog:
            self.watchdog.close(code)
        is_over = code == exits.SUCCEEDED or reason == "lost"
        if is_over or not sealed(self.context.folder):  # else the next attempt on this machine may still commit it
            shutil.rmtree(self.context.folder, ignore_errors=True)


def within(seconds: float, work: Callable[[], Result], otherwise: Result) -> Result:
    """Returns what ``work`` returns in time, else ``otherwise``; a thread that hangs is left behind."""
    results = []

    def run() -> None:
        try:
            results.append(work())
        except (SpotuneError, OSError) as error:
            say(str(error))

    thread = threading.Thread(target=run, name="end", daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else otherwise


def make_job(context: Context, newest: Commit | None, history: Sequence[RunRecord]) -> Job:
    """What the ranks are told; the newest commit says how the run was made so far."""
    config = context.run.config
    made_with = [record.config for record in history if newest and record.config_sha256 == newest.config_sha256]
    # Where the rows of a step were changed on purpose, the config says how many they are, whatever the ranks.
    is_kept = not made_with or all(config.get(key) == made_with[-1].get(key) for key in BATCH)
    save_every = parse_save_every(context.run.save_every)
    is_fixed = bool(save_every.steps or save_every.seconds)
    return Job(
        run_id=context.keys.run_id,
        attempt=context.attempt,
        config=config,
        config_path=context.run.config_path,
        cache=str(context.cache / "datasets"),
        save_steps=save_every.steps,
        save_seconds=save_every.seconds,
        save_as_config=not is_fixed and ("save_steps" in config or "save_strategy" in config),
        threads=newest.threads if newest else None,
        global_batch=newest.global_batch or None if newest and is_kept else None,
        data_files=context.run.data_files,
    )
