"""One attempt: restore, run the ranks, commit what they save, heed notices, and say how it ended."""

import json
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from spotune.contracts import exchange, exits
from spotune.contracts.durations import parse_save_every
from spotune.contracts.errors import Fenced, InputError, SpotuneError, StoreError
from spotune.contracts.events import EndReason
from spotune.contracts.exchange import Job, Outcome, Staged
from spotune.contracts.keys import Keys
from spotune.contracts.records import AttemptRecord, RunRecord
from spotune.contracts.store import Store
from spotune.guard import admission
from spotune.guard.committer import RETRIES_S, Committer, Lineage
from spotune.guard.faults import is_second_fault
from spotune.guard.finish import certify, copy_output
from spotune.guard.gang import Leader, gang_token
from spotune.guard.journal import Journal
from spotune.guard.machine import Machine
from spotune.guard.notices import Notices
from spotune.guard.ranks import PEER_GRACE_S, Ranks, free_port, worst
from spotune.guard.restore import Restored, newest_commit, restore
from spotune.guard.retention import KEEP
from spotune.guard.say import say
from spotune.guard.trackers import rebuild_offline, tracker_environ

POLL_S = 0.1
FENCE_S = 15.0
GREET_S = 20.0  # bad input is found by then; until then its one line stands alone


@dataclass(frozen=True)
class Site:
    """Where an attempt works: its machine and environment, scratch for this run, a cache that stays, a status file."""

    machine: Machine
    environ: Mapping[str, str]
    scratch: Path
    cache: Path
    status_file: str


class Attempt:
    """Everything that one attempt owns; ``run`` returns the exit code."""

    def __init__(
        self,
        store: Store,
        keys: Keys,
        run: RunRecord,
        record: AttemptRecord,
        site: Site,
        notices: Notices,
    ) -> None:
        self.store, self.keys, self.spec, self.record = store, keys, run, record
        self.site, self.notices = site, notices
        # What earlier attempts left on this machine is not ours to trust; only the bucket is.
        shutil.rmtree(site.scratch, ignore_errors=True)
        self.folder = site.scratch / f"{record.attempt:04d}"
        (self.folder / exchange.STAGED).mkdir(parents=True)
        self.journal = Journal(store, keys, record.attempt, exchange.events_path(self.folder, 0), site.status_file)
        self.journal.write("start", attempt=record.attempt, host=record.host, world_size=site.machine.world_size)
        self.committer: Committer | None = None
        self._begins_at = 0
        self._greet_at: float | None = time.monotonic() + GREET_S
        token = gang_token(keys.run_id, site.environ.get("SKYPILOT_TASK_ID", ""))
        self.leader = Leader(keys.run_id, site.machine, token)

    def run(self) -> int:
        """Trains to an end or to a notice; leaves the attempt's last event and, at a bad end, failed.json."""
        try:
            code, reason, message = self._train()
        except InputError as error:
            code, reason, message = error.exit_code, "failed", str(error)
        except SpotuneError as error:
            code, reason, message = error.exit_code, self._reason_of(error), str(error)
        faulted = code == exits.PREEMPTED and reason == "failed"
        if faulted and is_second_fault(self.store, self.keys, self.record.attempt):
            code, message = exits.FAILED, f"two attempts in a row failed and committed nothing: {message}"
        if code in (exits.FAILED, exits.BAD_INPUT):
            self._mark_failed(code, message)
        if message:
            say(message, bare=True)
        self._close(code, reason, message)
        return code

    def _reason_of(self, error: SpotuneError) -> EndReason:
        if isinstance(error, Fenced):
            return "lost"
        return "preempted" if self.notices.given else "failed"

    def _train(self) -> tuple[int, EndReason, str]:
        newest = newest_commit(self.store, self.keys)
        self._begins_at = newest.step if newest else 0
        admission.check_data(self.spec)
        admission.check_model(self.spec, self.site.cache.parent)
        save_every = parse_save_every(self.spec.save_every)
        job = Job(
            run_id=self.keys.run_id,
            attempt=self.record.attempt,
            config=self.spec.config,
            config_path=self.spec.config_path,
            cache=str(self.site.cache),
            save_steps=save_every.steps,
            save_seconds=save_every.seconds,
            threads=newest.threads if newest else None,
        )
        exchange.write_json(self.folder / exchange.JOB, job)
        exchange.write_json(self.folder / exchange.CONTROL, {"stop": False, "save": 0})
        trackers, port = tracker_environ(self.spec, self.site.environ), free_port()
        self.leader.gather(self.notices, job=asdict(job), master_port=port, environ=trackers)
        ranks = Ranks(self.folder, self.site.machine, port, {**self.site.environ, **trackers})
        try:
            self.journal.write("phase", phase="load")
            restoring = threading.Thread(target=self._restore, name="restore", daemon=True)
            restoring.start()
            outcome = self._watch(ranks, restoring)
        finally:
            ranks.kill()
        return self._conclude(outcome)

    def _restore(self) -> None:
        """Beside the worker's imports: fetches the checkpoint, then tells the worker to go on."""
        started = time.time()
        found, error = self._fetch_checkpoint()
        for line in found.rejected:
            say(f"checkpoint rejected: {line}")
        commit = found.commit
        if commit:
            say(f"resumed from the checkpoint of step {commit.step}, attempt {commit.attempt}")
        keep = int(self.spec.config.get("save_total_limit") or KEEP)
        tokens = commit.tokens if commit else 0
        self.leader.broadcast(restored=found.key or None, best=found.best_key or None, tokens=tokens)
        lineage = Lineage(self.spec, self.record.attempt, found.key, keep, self.leader.parts)
        self.committer = Committer(self.store, self.keys, lineage, self.folder, self.journal)
        self.journal.write(
            "restored",
            step=commit.step if commit else 0,
            commit=found.key or None,
            rejected=found.rejected,
            restore_s=round(time.time() - started, 3),
        )
        exchange.write_json(
            self.folder / exchange.RESTORED,
            {
                "checkpoint": found.checkpoint and str(found.checkpoint),
                "best_checkpoint": found.best and str(found.best),
                "tokens": tokens,
                "error": error,
            },
        )

    def _fetch_checkpoint(self) -> tuple[Restored, str | None]:
        """The newest good checkpoint; what went wrong, when the bucket could not be read in several tries."""
        for pause_s in (*RETRIES_S, None):
            try:
                return restore(self.store, self.keys, self.folder / exchange.TRAINER), None
            except (SpotuneError, OSError) as fault:
                if pause_s is None or isinstance(fault, InputError):
                    return Restored(), str(fault)
                say(f"the checkpoint is not fetched yet: {fault}")
                time.sleep(pause_s)
        raise AssertionError("the last try returns")

    def _watch(self, ranks: Ranks, restoring: threading.Thread) -> Outcome:
        """Until the ranks have ended: passes on checkpoints, notices and the fence."""
        stopping, fence_at = False, time.monotonic()
        while ranks.running:
            self._greet()
            self._collect()
            if self.committer and self.committer.fenced:
                raise self.committer.fenced
            if time.monotonic() - fence_at > FENCE_S:
                fence_at = time.monotonic()
                self._look_at_fence()
            if not restoring.is_alive() and not (self.folder / exchange.RESTORED).exists():
                raise SpotuneError("restoring the checkpoint ended without a result, see the traceback above")
            if self.leader.lost:
                ranks.kill()
                return Outcome(how="retry", message="a machine of this job is gone")
            if self.leader.notice:
                self.notices.give(self.leader.notice)
            if self.notices.wait(POLL_S) and not stopping:
                stopping = True
                if not self._ask_to_stop():
                    ranks.kill()
                    return Outcome(how="stopped")
        restoring.join()
        self._collect()
        others = self.leader.wait_for_outcomes(PEER_GRACE_S)
        return worst([ranks.outcome(), *(Outcome(**outcome) for outcome in others)])

    def _greet(self) -> None:
        """Says where the records are, once it has become clear that there is something to run."""
        if self._greet_at and (self.journal.progress.max_steps or time.monotonic() > self._greet_at):
            self._greet_at = None
            place = f"{self.store.url}/{self.keys.root}"
            say(f"{self.keys.run_id}: attempt {self.record.attempt} on {self.record.host}, records in {place}")

    def _look_at_fence(self) -> None:
        try:
            admission.check_fence(self.store, self.keys, self.record.attempt)
        except StoreError as error:
            say(f"cannot look for later attempts now: {error}")

    def _ask_to_stop(self) -> bool:
        """Asks for a save at the next step boundary; False when there is nothing new to save."""
        self.journal.write("notice", source=self.notices.source, grace_s=None)
        say(f"{self.notices.source}: saving at the next step boundary, then leaving")
        progress = self.journal.progress
        if self.journal.first_step is None or progress.phase == "teardown":
            # Not a step made yet, or all are made: the last commit is all there is, or the result is on its way.
            return progress.phase == "teardown"
        exchange.write_json(self.folder / exchange.CONTROL, {"stop": True, "save": 0})
        return True

    def _collect(self) -> None:
        """Hands what the worker has staged to the committer, the newest only."""
        paths = sorted((self.folder / exchange.STAGED).glob("*.json"))
        if not paths or not self.committer:
            return
        staged = [Staged(**json.loads(path.read_text())) for path in paths]
        for path in paths:
            path.unlink()
        self.committer.submit(staged[-1])

    def _conclude(self, outcome: Outcome) -> tuple[int, EndReason, str]:
        """From how the ranks ended to exit code, reason and message."""
        if self.committer:
            self.committer.drain()
            if self.committer.fenced:
                raise self.committer.fenced
        match outcome.how:
            case "completed":
                return self._complete(outcome)
            case "stopped" if self.notices.given:
                return exits.PREEMPTED, "preempted", ""
            case "stopped":  # the checkpoint could not be fetched
                restored = exchange.read_json(self.folder / exchange.RESTORED) or {}
                return exits.PREEMPTED, "failed", restored.get("error") or "training stopped without being asked to"
            case "retry":
                return exits.PREEMPTED, "preempted" if self.notices.given else "failed", outcome.message
            case "bad_input":
                return exits.BAD_INPUT, "failed", outcome.message
            case "failed":
                return exits.FAILED, "failed", outcome.message

    def _complete(self, outcome: Outcome) -> tuple[int, EndReason, str]:
        self.journal.write("phase", phase="teardown")
        certificate = certify(self.store, self.keys, self.record.attempt, outcome.step, self.folder)
        say(f"{self.keys.run_id} is certified at step {certificate.step}: weights {certificate.weights_sha256[:16]}")
        if output_dir := self.spec.config.get("output_dir"):
            self._copy_output(Path(output_dir))
        rebuild_offline(self.store, self.keys, self.spec, self.site.environ)
        return exits.SUCCEEDED, "completed", ""

    def _copy_output(self, target: Path) -> None:
        try:
            copy_output(self.folder, target)
        except OSError as error:  # the result is safe in the bucket
            say(f"output_dir {target}: not copied there: {error}")

    def _mark_failed(self, code: int, message: str) -> None:
        step = self.journal.progress.step or self._begins_at
        attempt = self.record.attempt
        try:
            admission.leave_mark(
                self.store, self.keys.failed, self.keys.run_id, attempt, reason=message, exit_code=code, step=step
            )
        except SpotuneError as error:
            say(str(error))

    def _close(self, code: int, reason: EndReason, message: str) -> None:
        if self.committer:
            self.committer.close()
        step = self.journal.progress.step
        self.journal.write("end", reason=reason, exit_code=code, step=step, message=message)
        try:
            self.journal.close()
        except SpotuneError as error:
            say(f"the last events are not recorded: {error}")
        self.leader.close(code)
        shutil.rmtree(self.folder, ignore_errors=True)
