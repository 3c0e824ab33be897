"""While the ranks run: their checkpoints, the clock, the fence, the bucket's absence, and notices."""

import time
from collections.abc import Callable
from pathlib import Path

from spotune.core.errors import InputError, SpotuneError, StoreError
from spotune.core.failpoints import failpoint
from spotune.core.protocol import Job, Outcome
from spotune.guard import claim
from spotune.guard.budget import Wall, read_budget
from spotune.guard.checkpoints import KEEP, Committer, Handover, Lineage, Retention, seal, sealed
from spotune.guard.context import Context
from spotune.guard.journal import Journal, say
from spotune.guard.leaving import Notices, Outlook, fits
from spotune.guard.multinode import Leader
from spotune.guard.ranks import PEER_GRACE_S, Ranks, worst
from spotune.guard.restore_thread import Ready, Restoring
from spotune.guard.save_schedule import SPOT, STEADY, Inputs, Pacer, Toll, Wishes
from spotune.guard.stalls import Stall

POLL_S = 0.1
FENCE_S = 15.0
HANG_S = 5.0  # an upload that hangs beside its ranks is not waited for
GREET_S = 20.0  # bad input is found by then; until then its one line stands alone


class Watch:
    """Looks at everything, ten times a second, and at most one thing makes it end early.

    Args:
        clock: seconds that never go back.

    Attributes:
        committer: there once the ranks have their checkpoint.
        stall: why it ended, where the watchdog had it end.
        wall: of the run's budget; once reached, training was stopped for that.
    """

    def __init__(
        self,
        context: Context,
        job: Job,
        journal: Journal,
        leader: Leader,
        notices: Notices,
        toll: Toll,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self.context, self.job, self.journal, self.leader = context, job, journal, leader
        self.notices, self.toll = notices, toll
        self.wishes = Wishes(context.folder)
        self.handover = Handover(context.folder, context.machine.ranks)
        self.committer: Committer | None = None
        self.pacer: Pacer | None = None
        self.wall = Wall(read_budget(context), journal, toll)
        self._is_stopping = False
        self._fence_at = clock()
        self._greet_at: float | None = clock() + GREET_S
        self.stall: Stall | None = None
        self._leave_by: float | None = None  # by when to stop waiting for uploads, after a notice

    def until_ended(
        self, ranks: Ranks, restoring: Restoring, stall: Callable[[], Stall | None] = lambda: None
    ) -> Outcome:
        """Returns how training ended; raises Fenced, and what kept the ranks from a checkpoint."""
        while ranks.running:
            self._greet()
            self._look_at_restore(restoring)
            self._collect()
            self._look_at_fence()
            if found := stall():
                self.stall = found
                return Outcome(how="retry", message=found.what)
            if self.leader.lost:
                return Outcome(how="retry", message="a machine of this job is gone")
            if self.leader.notice:
                self.notices.give(*self.leader.notice)
                self.leader.notice = None
            if self.pacer and not self._is_stopping and self.journal.first_step is not None:
                self.pacer.look()
            if not self._is_stopping and self.wall.look():
                self._is_stopping = True
                if self.journal.first_step is None:  # nothing that is not in the bucket already
                    return Outcome(how="stopped")
                self.wishes.ask_to_stop()
            if not self._is_stopping and self._is_bucket_away():
                self._is_stopping = True
                self.wishes.ask_to_stop()
            if self.notices.wait(POLL_S) and not self._is_stopping:
                self._is_stopping = True
                if not self._heed_notice():
                    return Outcome(how="stopped")
        self._look_at_restore(restoring)
        self._collect()
        others = self.leader.wait_for_outcomes(PEER_GRACE_S)
        return worst([ranks.outcome(), *others])

    def finish_uploads(self) -> None:
        """Waits for what is on its way to the bucket, as long as there is time for it. Raises Fenced."""
        if self.committer is None:
            return
        self._collect()
        self.committer.drain(self._time_to_upload_s())
        if self.committer.fenced:
            raise self.committer.fenced
        for staged in self.handover.taken:  # what is not committed must at least be found again
            if staged.step > self.committer.committed_step and Path(staged.checkpoint).is_dir():
                seal(self.context.folder, staged, self.context.run.config_sha256, self.context.run.revision)

    def _time_to_upload_s(self) -> float:
        """How long to wait for uploads once the ranks have ended: until the machine goes, or patience has run out."""
        if self.stall and self.stall.phase == "upload":
            return 0.0
        if self._leave_by is not None:
            return max(0.0, self._leave_by - self._clock())
        away_s = self.committer.away_s if self.committer else 0.0
        return max(0.0, min(self.context.patience_s - away_s, self.notices.left_s))

    @property
    def uploading(self) -> int | None:
        """The step whose upload is under way, None for none, and while the bucket is known to be away."""
        committer = self.committer
        under_way = committer.under_way if committer and not committer.away_s else None
        return under_way[0] if under_way else None

    def close(self) -> None:
        """Ends the uploads."""
        if self.committer:
            self.committer.close(HANG_S if self.stall else None)

    def why_stopped(self) -> str:
        """The message of an attempt that ended since its bucket was away; empty for one that did not."""
        committer = self.committer
        if committer is None or committer.error is None:
            return ""
        waiting = [staged.step for staged in sealed(self.context.folder)]
        rest = f"; step {max(waiting)} is on this machine's disk, the next attempt here commits it" if waiting else ""
        return f"{committer.error}; the last good step in the bucket is {committer.committed_step}{rest}"

    def _look_at_restore(self, restoring: Restoring) -> None:
        if restoring.error is not None:
            raise restoring.error
        if restoring.has_died:
            raise SpotuneError("restoring the checkpoint ended without a result, see the traceback above")
        if restoring.ready is not None and self.committer is None:
            self._begin_committing(restoring.ready)

    def _begin_committing(self, ready: Ready) -> None:
        """The ranks have their checkpoint: from now on theirs are committed, and asked for in time."""
        context, job, config = self.context, self.job, self.context.run.config
        commit = ready.commit
        lineage = Lineage(context.run, context.attempt, ready.found.key, commit.ordinal if commit else 0)
        retention = Retention(
            context.store,
            context.keys,
            context.attempt,
            keep=int(config.get("save_total_limit") or KEEP),
            keep_every=int(config.get("keep_every") or 0),
            bad=ready.found.bad,
        )
        self.committer = Committer(context, lineage, retention, self.journal, self.leader.parts, self.toll, self._clock)
        self.committer.committed_step = commit.step if commit else 0
        if not (job.save_steps or job.save_seconds or job.save_as_config):
            inputs = Inputs(
                restore_s=ready.restore_s,
                age_s=time.time() - context.record.claimed_at,
                spells_s=tuple(context.record.spells_s),
                prior=SPOT if context.run.use_spot else STEADY,
            )
            self.pacer = Pacer(inputs, self.toll, self.wishes, self.journal)
            self.journal.listen(self.pacer.take)

    def _greet(self) -> None:
        """Says where the records are, once it has become clear that there is something to run."""
        if self._greet_at and (self.journal.progress.max_steps or self._clock() > self._greet_at):
            self._greet_at = None
            context = self.context
            place = f"{context.store.url}/{context.keys.root}"
            say(f"{context.keys.run_id}: attempt {context.attempt} on {context.record.host}, records in {place}")

    def _collect(self) -> None:
        """Hands what the ranks have staged to the committer; raises Fenced when that had to give up for good."""
        if self.committer is None:
            return
        for staged in self.handover.take():
            self.committer.submit(staged)
        if self.committer.fenced:
            raise self.committer.fenced

    def _look_at_fence(self) -> None:
        if self._clock() - self._fence_at < FENCE_S:
            return
        self._fence_at = self._clock()
        try:
            claim.check_fence(self.context.store, self.context.keys, self.context.attempt)
        except (StoreError, InputError) as error:
            say(f"cannot look for later attempts now: {error}")

    def _is_bucket_away(self) -> bool:
        return self.committer is not None and self.committer.away_s > self.context.patience_s

    def _heed_notice(self) -> bool:
        """Asks for one more save if it fits into what is left; False when the ranks need not go on."""
        failpoint("noticed")
        source, left_s = self.notices.source, self.notices.left_s
        self.journal.write("notice", source=source, grace_s=round(left_s, 1))
        if self.journal.progress.phase == "teardown":
            say(f"{source}: all steps are made, the result is on its way")
            return True
        decision = fits(self._outlook(left_s))
        say(f"{source}: {decision.reason}")
        if decision.action == "save":
            self.wishes.ask_to_stop()
            return True
        self._leave_by = self._clock() + (left_s if decision.action == "finish" else 0.0)
        return False

    def _outlook(self, left_s: float) -> Outlook:
        """What is known about one more save."""
        measured, committer = self.toll.record, self.committer
        safe = max([0, *(staged.step for staged in self.handover.taken)])
        done = 0 if self.journal.first_step is None else self.journal.progress.step
        under_way = committer.under_way if committer else None
        send_s = measured.get("send_s")
        stops_s = measured.get("stall_s", 0.0) + measured["write_s"] if "write_s" in measured else None
        return Outlook(
            left_s=left_s,
            new_steps=done - max(safe, committer.committed_step if committer else 0),
            step_s=measured.get("step_s"),
            write_s=stops_s,
            upload_s=send_s,
            uploading=under_way is not None,
            upload_left_s=max(send_s - under_way[1], 0.0) if under_way and send_s is not None else None,
        )
