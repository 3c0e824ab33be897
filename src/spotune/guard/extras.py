"""After the certificate: the adapter merged into its base, the result pushed to the hub, where the config asks for it.

Each extra is done by a process of its own on the worker's side of seam 2, and has a mark in the bucket once it is
done, create-only. Without the mark it is owed: the next attempt does it from its start, and nothing else. Whatever
becomes of extras, the run stays SUCCEEDED.
"""

import time
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

from spotune.contracts.environment import BUCKET, RUN_ID
from spotune.contracts.errors import Fenced, Misplaced, SpotuneError, StoreError
from spotune.contracts.exchange import OUTPUT, write_json
from spotune.contracts.extras import CONFIG_KEYS, EXTRAS, MERGE, MERGED, PUSH, ExtraJob, Pushed, asked_for
from spotune.contracts.failpoints import failpoint
from spotune.contracts.keys import Keys
from spotune.contracts.records import Certificate, Record, RunRecord
from spotune.contracts.revisions import record_in_force
from spotune.contracts.store import Store
from spotune.guard.admission import check_fence, check_model
from spotune.guard.context import Context
from spotune.guard.extra_process import run_extra
from spotune.guard.extra_watch import ExtraWatch
from spotune.guard.finish import certificate_of, fetch_result, send, weights_of
from spotune.guard.grace import is_person
from spotune.guard.journal import Journal
from spotune.guard.notices import Notices
from spotune.guard.say import say

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
