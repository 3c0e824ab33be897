"""Notices the process of an extra that hangs: it neither computes nor moves bytes. What the watchdog is for ranks."""

import time
from collections.abc import Callable

from spotune.contracts.durations import parse_stall_after
from spotune.guard import procfs
from spotune.guard.context import Context
from spotune.guard.stacks import collect_stacks, upload_stacks
from spotune.guard.stalls import Budgets, Sample, SeenTime, Stalls, boot_time, sample_every_s


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
            self._sampled_s, sample = now, Sample(procfs.work_of({pid}), procfs.own_work())
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
