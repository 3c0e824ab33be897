"""One attempt: starts the ranks, watches them, commits their checkpoints, certifies the result, records its end."""

import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from spotune.core import errors, protocol
from spotune.core.environment import parse_save_every
from spotune.core.errors import Fenced, InputError, Misplaced, SpotuneError, StoreError
from spotune.core.io import failpoint
from spotune.core.protocol import EndReason, Outcome, WorkerJob, asked_for
from spotune.core.records import Certificate, Commit, RunRecord
from spotune.core.revisions import record_history
from spotune.guard import claim
from spotune.guard.budget import BudgetLimit, read_budget
from spotune.guard.checkpoints import KEEP, Committer, Lineage, Retention, StagingFolder, seal, sealed
from spotune.guard.claim import for_people
from spotune.guard.extras import Extras, rebuild_offline, tracker_environ
from spotune.guard.finish import certify, copy_output
from spotune.guard.journal import Clock, Context, GpuMeter, Journal, log
from spotune.guard.leaving import Notices, Outlook, fits
from spotune.guard.multinode import Leader, job_token
from spotune.guard.ranks import PEER_GRACE_S, Ranks, free_port, upload_stacks, worst
from spotune.guard.restore import FAULTS, is_second_fault, newest_commit
from spotune.guard.restore_thread import Ready, RestoreThread
from spotune.guard.save_schedule import SPOT, STEADY, ControlFile, Inputs, SaveCost, SaveScheduler
from spotune.guard.stalls import Stall, Watchdog, sample_every_s

FENCE_S = 15.0
GREET_S = 20.0  # bad input is found by then; its one line must stand alone
CERTIFY_PAUSE_S = 15.0
HANGING_S = 30.0  # how long the end of a stalled attempt waits for a bucket that may not answer

Result = TypeVar("Result")
Ending = tuple[int, EndReason, str]  # exit code, reason for the report, one line for people


class Watch:
    """Watches the ranks ten times a second: checkpoints, budget, fence, bucket and notices."""

    def __init__(
        self,
        context: Context,
        job: WorkerJob,
        journal: Journal,
        leader: Leader,
        notices: Notices,
        save_cost: SaveCost,
        clock: Clock = time.monotonic,
    ) -> None:
        self.context, self.job, self.journal, self.leader = context, job, journal, leader
        self.notices, self.save_cost, self._clock = notices, save_cost, clock
        self.control = ControlFile(context.folder)
        self.staging = StagingFolder(context.folder, context.machine.ranks)
        self.committer: Committer | None = None  # once the ranks have their checkpoint
        self.save_scheduler: SaveScheduler | None = None
        self.budget_limit = BudgetLimit(read_budget(context), journal, save_cost)
        self._is_stopping, self._fence_at = False, clock()
        self._greet_at: float | None = clock() + GREET_S
        self.stall: Stall | None = None  # why the watchdog ended the attempt
        self._leave_by: float | None = None  # after a notice: when to stop waiting for uploads

    def until_ended(
        self, ranks: Ranks, restoring: RestoreThread, stall: Callable[[], Stall | None] = lambda: None
    ) -> Outcome:
        """Returns how training ended. Raises Fenced, and the restore thread's error."""
        while ranks.running:
            self._log_place()
            self._check_restore(restoring)
            self._collect()
            self._check_fence()
            if found := stall():
                self.stall = found
                return Outcome(how="retry", message=found.what)
            if self.leader.lost:
                return Outcome(how="retry", message="a machine of this job is gone")
            if self.leader.notice:
                self.notices.give(*self.leader.notice)
                self.leader.notice = None
            if self.save_scheduler and not self._is_stopping and self.journal.first_step is not None:
                self.save_scheduler.save_if_due()
            if not self._is_stopping and self.budget_limit.check():
                if self.journal.first_step is None:  # the bucket already has everything
                    return Outcome(how="stopped")
                self._stop()
            if not self._is_stopping and self.committer and self.committer.away_s > self.context.patience_s:
                self._stop()
            if self.notices.wait(0.1) and not self._is_stopping:
                self._is_stopping = True
                if not self._on_notice():
                    return Outcome(how="stopped")
        self._check_restore(restoring)
        self._collect()
        others = self.leader.wait_for_outcomes(PEER_GRACE_S)
        return worst([ranks.outcome(), *others])

    def _stop(self) -> None:
        self._is_stopping = True
        self.control.ask_to_stop()

    def finish_uploads(self) -> None:
        """Waits for uploads while there is time, then seals what is not committed. Raises Fenced."""
        if self.committer is None:
            return
        self._collect()
        self.committer.drain(self._time_to_upload_s())
        if self.committer.fenced:
            raise self.committer.fenced
        for staged in self.staging.collected:  # the next attempt on this machine must find what is not committed
            if staged.step > self.committer.committed_step and Path(staged.checkpoint).is_dir():
                seal(self.context.folder, staged, self.context.run.config_sha256, self.context.run.revision)

    def _time_to_upload_s(self) -> float:
        """Returns how long to wait for uploads after the ranks ended: until the machine goes or patience is over."""
        if self.stall and self.stall.phase == "upload":
            return 0.0
        if self._leave_by is not None:
            return max(0.0, self._leave_by - self._clock())
        away_s = self.committer.away_s if self.committer else 0.0
        return max(0.0, min(self.context.patience_s - away_s, self.notices.left_s))

    def uploading(self) -> int | None:
        """Returns the step whose upload is under way; None for none, and while the bucket is known to be away."""
        committer = self.committer
        under_way = committer.under_way if committer and not committer.away_s else None
        return under_way[0] if under_way else None

    def why_stopped(self) -> str:
        """Returns the message of an attempt that ended because its bucket was away; empty otherwise."""
        committer = self.committer
        if committer is None or committer.error is None:
            return ""
        waiting = [staged.step for staged in sealed(self.context.folder)]
        rest = f"; step {max(waiting)} is on this machine's disk, the next attempt here commits it" if waiting else ""
        return f"{committer.error}; the last good step in the bucket is {committer.committed_step}{rest}"

    def _check_restore(self, restoring: RestoreThread) -> None:
        if restoring.error is not None:
            raise restoring.error
        if restoring.has_died:
            raise SpotuneError("restoring the checkpoint ended without a result, see the traceback above")
        if restoring.ready is not None and self.committer is None:
            self._begin_committing(restoring.ready)

    def _begin_committing(self, ready: Ready) -> None:
        """Creates the committer and the save scheduler: the ranks now have their checkpoint."""
        context, job, config, commit = self.context, self.job, self.context.run.config, ready.found.commit
        lineage = Lineage(context.run, context.attempt, ready.found.key, commit.ordinal if commit else 0)
        retention = Retention(
            context.store,
            context.keys,
            context.attempt,
            keep=int(config.get("save_total_limit") or KEEP),
            keep_every=int(config.get("keep_every") or 0),
            bad=ready.found.bad,
        )
        self.committer = Committer(
            context, lineage, retention, self.journal, self.leader.parts, self.save_cost, self._clock
        )
        self.committer.committed_step = commit.step if commit else 0
        if not (job.save_steps or job.save_seconds or job.save_as_config):
            inputs = Inputs(
                restore_s=ready.restore_s,
                age_s=time.time() - context.record.claimed_at,
                spells_s=tuple(context.record.spells_s),
                prior=SPOT if context.run.use_spot else STEADY,
            )
            self.save_scheduler = SaveScheduler(inputs, self.save_cost, self.control, self.journal)
            self.journal.listen(self.save_scheduler.on_event)

    def _log_place(self) -> None:
        """Logs once where the records are, when it is clear that there is something to run."""
        if self._greet_at and (self.journal.progress.max_steps or self._clock() > self._greet_at):
            self._greet_at = None
            context = self.context
            place = f"{context.store.url}/{context.keys.root}"
            log(f"{context.keys.run_id}: attempt {context.attempt} on {context.record.host}, records in {place}")

    def _collect(self) -> None:
        if self.committer is None:
            return
        for staged in self.staging.collect():
            self.committer.submit(staged)
        if self.committer.fenced:
            raise self.committer.fenced

    def _check_fence(self) -> None:
        if self._clock() - self._fence_at < FENCE_S:
            return
        self._fence_at = self._clock()
        try:
            claim.check_fence(self.context.store, self.context.keys, self.context.attempt)
        except (StoreError, InputError) as error:
            log(f"cannot look for later attempts now: {error}")

    def _on_notice(self) -> bool:
        """Asks for one more save if it fits into the time left. Returns False if the ranks need not go on."""
        failpoint("noticed")
        source, left_s = self.notices.source, self.notices.left_s
        self.journal.write("notice", source=source, grace_s=round(left_s, 1))
        if self.journal.progress.phase == "teardown":
            log(f"{source}: all steps are made, the result is on its way")
            return True
        measured, committer = self.save_cost.record, self.committer
        under_way = committer.under_way if committer else None
        done = 0 if self.journal.first_step is None else self.journal.progress.step
        committed, send_s = committer.committed_step if committer else 0, measured.get("send_s")
        action, why = fits(
            Outlook(
                left_s=left_s,
                new_steps=done - max([0, committed, *(staged.step for staged in self.staging.collected)]),
                step_s=measured.get("step_s"),
                write_s=measured.get("stall_s", 0.0) + measured["write_s"] if "write_s" in measured else None,
                upload_s=send_s,
                uploading=under_way is not None,
                upload_left_s=max(send_s - under_way[1], 0.0) if under_way and send_s is not None else None,
            )
        )
        log(f"{source}: {why}")
        if action == "save":
            self.control.ask_to_stop()
            return True
        self._leave_by = self._clock() + (left_s if action == "finish" else 0.0)
        return False


class Attempt:
    """Everything that one attempt owns. ``run`` returns the exit code."""

    def __init__(self, context: Context, notices: Notices, clock: Clock = time.monotonic) -> None:
        self.context, self.notices, self._clock = context, notices, clock
        shutil.rmtree(context.folder, ignore_errors=True)
        (context.folder / protocol.STAGED).mkdir(parents=True)
        self.journal = Journal.of(context)
        self.leader = Leader(context.keys.run_id, context.machine, job_token(context.keys.run_id, context.environ))
        self.watch: Watch | None = None
        self.watchdog: Watchdog | None = None
        self._newest: Commit | None = None
        self._refused_versions: list[str] = []
        self._ending: Ending | None = None
        self._is_certified = False

    def run(self) -> int:
        """Trains to the end or to a notice. Writes the attempt's last event and, after a bad end, failed.json."""
        try:
            code, reason, message = self._train()
        except InputError as error:
            code, reason, message = error.exit_code, "failed", str(error)
        except Fenced as error:
            code, reason, message = error.exit_code, "lost", str(error)
        except SpotuneError as error:
            code, message = error.exit_code, str(error)
            reason = "preempted" if self.notices.given else "failed"
        except (OSError, MemoryError) as error:  # this machine's: errors of the bucket have their own class
            code, reason, message = errors.PREEMPTED, "failed", f"this machine: {error}"
        if code == errors.PREEMPTED and reason in FAULTS and self._is_second_fault():
            code, message = errors.FAILED, f"two attempts in a row failed and committed nothing: {message}"
        if code in (errors.FAILED, errors.BAD_INPUT):
            self._mark_failed(code, message)
        if message:
            log(message, bare=True)
        self._ending = code, reason, message
        self._close(code, reason, message)
        return code

    def end_stalled(self, message: str) -> int:
        """Ends the attempt for the main thread, which hangs; returns the exit code. Keeps what is already decided."""
        reason: EndReason
        if self._ending:
            code, reason, _ = self._ending
        elif self._is_certified:
            code, reason = errors.SUCCEEDED, "completed"
        else:
            is_second = within(HANGING_S, self._is_second_fault, False)
            code, reason = errors.FAILED if is_second else errors.PREEMPTED, "stalled"
        log(message, bare=True)
        self.journal.write("end", reason=reason, exit_code=code, step=self.journal.progress.step, message=message)

        def record() -> None:
            if code == errors.FAILED and not self._ending:
                self._mark_failed(code, message)
            upload_stacks(self.context.store, self.context.keys, self.context.attempt, self.context.folder)
            self.journal.close()

        within(HANGING_S, record, None)
        self.leader.close(code)
        return code

    def _is_second_fault(self) -> bool:
        try:
            return is_second_fault(self.context.store, self.context.keys, self.context.attempt)
        except StoreError:  # then no earlier fault is known
            return False

    def _train(self) -> Ending:
        context = self.context
        self._newest = newest_commit(context.store, context.keys)
        save_cost = SaveCost(self._newest.saving if self._newest else None)
        self.journal.listen(save_cost.on_event)
        with for_people(context.keys):
            history = record_history(context.store, context.keys)
        job = make_job(context, self._newest, history)
        protocol.write_json(context.folder / protocol.JOB, job)
        watch = self.watch = Watch(context, job, self.journal, self.leader, self.notices, save_cost)
        dog = self.watchdog = Watchdog(
            context, self.journal, self.leader, save_cost, watch.uploading, lambda: self.notices.given, self.end_stalled
        )
        trackers, port = tracker_environ(context.run, context.environ), free_port()
        sample_s = sample_every_s(dog.floor_s) if dog.floor_s else 0.0
        self.leader.gather(self.notices, job=asdict(job), master_port=port, environ=trackers, sample_s=sample_s)
        ranks = Ranks(context.folder, context.machine, port, {**context.environ, **trackers})
        try:
            self.journal.write("phase", phase="load")
            dog.start(ranks.pids)
            with GpuMeter(context.machine.gpus, context.environ, self.journal):
                restoring = RestoreThread(context, self.journal, self.leader)
                try:
                    outcome = watch.until_ended(ranks, restoring, lambda: dog.stall)
                finally:
                    restoring.stop()
        finally:
            dog.stop(has_stalled=watch.stall is not None)
            ranks.kill()
        watch.finish_uploads()
        return self._conclude(watch, outcome)

    def _conclude(self, watch: Watch, outcome: Outcome) -> Ending:
        match outcome.how:
            case "completed":
                return self._complete(outcome.step)
            case "stopped" if self.notices.given:
                return errors.PREEMPTED, "preempted", ""
            case "stopped" if watch.budget_limit.reached and not watch.why_stopped():
                return self._pause(watch)
            case "stopped":
                return errors.PREEMPTED, "failed", watch.why_stopped() or "training stopped without being asked to"
            case "retry" if self.watchdog and watch.stall:
                return errors.PREEMPTED, "stalled", self.watchdog.message
            case "retry":
                return errors.PREEMPTED, "preempted" if self.notices.given else "failed", outcome.message
            case "bad_input":
                self._refused_versions = outcome.versions
                return errors.BAD_INPUT, "failed", outcome.message
            case "failed":
                return errors.FAILED, "failed", outcome.message

    def _complete(self, step: int) -> Ending:
        context = self.context
        self.journal.write("phase", phase="teardown")
        certificate = self._certify(step)
        self._is_certified = True
        log(f"{context.keys.run_id} is certified at step {certificate.step}: weights {certificate.weights_sha256[:16]}")
        if output_dir := context.run.config.get("output_dir"):
            try:
                copy_output(context.folder, Path(output_dir), context.keys.run_id)
            except OSError as error:
                place = f"{context.store.url}/{context.keys.output}"
                log(f"output_dir {output_dir}: the result is in {place}, not copied: {error}")
        rebuild_offline(context.store, context.keys, context.run, context.environ)
        self.leader.close(errors.SUCCEEDED)  # the rest needs this machine only
        if not Extras(context, certificate, self.notices, self.journal).run(asked_for(context.run.config)):
            return errors.PREEMPTED, "preempted", ""
        return errors.SUCCEEDED, "completed", ""

    def _certify(self, step: int) -> Certificate:
        """Uploads and certifies the result; retries while the bucket is away, for ``patience_s`` at most."""
        context = self.context
        deadline = self._clock() + context.patience_s
        while True:
            try:
                return certify(context.store, context.keys, context.attempt, step, context.folder)
            except StoreError as error:
                is_over = self._clock() > deadline or self.notices.left_s <= 0
                if is_over or isinstance(error, Misplaced):  # only people can mend that
                    kind = Misplaced if isinstance(error, Misplaced) else StoreError
                    raise kind(f"{error}; all {step} steps are made, the result is not in the bucket") from error
                log(f"the result is not certified yet: {error}")
                self.notices.wait(min(CERTIFY_PAUSE_S, self.notices.left_s))

    def _pause(self, watch: Watch) -> Ending:
        """Writes the mark before anything else: if that fails, the next attempt has to find the limit again."""
        step = watch.committer.committed_step if watch.committer else self._newest.step if self._newest else 0
        reason = watch.budget_limit.reason(step)
        self._leave_mark(self.context.keys.paused, errors.PAUSED, reason, step)
        run_id = self.context.keys.run_id
        flag = "" if self.context.run.budget_usd is None else " --budget USD"
        return errors.PAUSED, "paused", f"{run_id} is paused: {reason} (spotune resume {run_id}{flag})"

    def _mark_failed(self, code: int, message: str) -> None:
        self.journal.poll()  # the ranks' last steps may be unread
        step = self.journal.progress.step or (self._newest.step if self._newest else 0)
        try:
            self._leave_mark(self.context.keys.failed, code, message, step)
        except SpotuneError as error:
            log(str(error))

    def _leave_mark(self, key: str, code: int, reason: str, step: int) -> None:
        context = self.context
        facts = {"reason": reason, "exit_code": code, "step": step, "versions": self._refused_versions}
        claim.leave_mark(context.store, key, context.keys.run_id, context.attempt, **facts)

    def _close(self, code: int, reason: EndReason, message: str) -> None:
        if self.watch and self.watch.committer:
            self.watch.committer.close(5.0 if self.watch.stall else None)  # after a stall it may hang
        upload_stacks(self.context.store, self.context.keys, self.context.attempt, self.context.folder)
        self.journal.poll()
        self.journal.end(reason, code, self.journal.progress.step, message)
        self.leader.close(code)
        if self.watchdog:
            self.watchdog.close(code)
        is_over = code == errors.SUCCEEDED or reason == "lost"
        if is_over or not sealed(self.context.folder):  # else the next attempt on this machine may commit it
            shutil.rmtree(self.context.folder, ignore_errors=True)


def within(seconds: float, work: Callable[[], Result], otherwise: Result) -> Result:
    """Returns what ``work`` returns in time, else ``otherwise``; leaves a thread that hangs behind."""
    results = []

    def run() -> None:
        try:
            results.append(work())
        except (SpotuneError, OSError) as error:
            log(str(error))

    thread = threading.Thread(target=run, name="end", daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else otherwise


def make_job(context: Context, newest: Commit | None, history: Sequence[RunRecord]) -> WorkerJob:
    """Returns the ranks' job; the newest commit says how the run was made so far."""
    config, save_every = context.run.config, parse_save_every(context.run.save_every)
    made_with = [record.config for record in history if newest and record.config_sha256 == newest.config_sha256]
    # If the rows of a step were changed on purpose, the config decides their number, whatever the ranks.
    batch = ("per_device_train_batch_size", "gradient_accumulation_steps")
    is_kept = not made_with or all(config.get(key) == made_with[-1].get(key) for key in batch)
    is_fixed = bool(save_every.steps or save_every.seconds)
    return WorkerJob(
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
