"""The journal: one ordered stream of events of this attempt, and what can be seen while it runs.

Reads the worker's local event log, adds the guard's own events, uploads parts that are never rewritten,
and keeps ``progress.json`` and the local status file current.
"""

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from spotune.contracts.errors import SpotuneError
from spotune.contracts.events import as_json, as_number, is_whole
from spotune.contracts.keys import Keys
from spotune.contracts.records import Progress
from spotune.contracts.store import Store
from spotune.guard.say import say

POLL_S = 0.2
# A part is uploaded when it holds a twentieth of the attempt's age, between these: a machine that vanishes loses
# at most that much detail, and a day's attempt has a few thousand parts, not a hundred thousand.
PART_S = (1.0, 15.0)
HEARTBEAT_S = 15.0  # the contract: progress.json at most every 15 s


class Journal:
    """Thread-safe; ``close`` flushes. Faults of the store are said once and retried with the next part.

    ``shown``: what can be seen to begin with, where an attempt does not start from nothing.
    """

    def __init__(
        self,
        store: Store,
        keys: Keys,
        attempt: int,
        worker_log: Path,
        status_file: str = "",
        shown: Progress | None = None,
    ) -> None:
        self._store, self._keys, self._attempt = store, keys, attempt
        self._worker_log, self._status_file = worker_log, status_file
        self._lock = threading.RLock()
        self._flushing = threading.Lock()
        self._pending: list[str] = []
        self._offset, self._part = 0, 0
        self._began = self._flushed_at = self._beat_at = time.monotonic()
        self._shown = shown or Progress(run_id=keys.run_id, attempt=attempt, phase="load", at=time.time())
        self.first_step: int | None = None
        self._listeners: list[Callable[[dict[str, Any]], None]] = []
        self._stop = threading.Event()
        self._show()
        self._thread = threading.Thread(target=self._work, name="journal", daemon=True)
        self._thread.start()

    def listen(self, listener: Callable[[dict[str, Any]], None]) -> None:
        """Calls ``listener`` with each event from now on, in order; it must be quick, and write none."""
        with self._lock:
            self._listeners.append(listener)

    @property
    def progress(self) -> Progress:
        with self._lock:
            return self._shown

    def write(self, event: str, **fields: Any) -> None:
        """Adds one of the guard's own events, after all that the worker has written so far."""
        with self._lock:
            self._read_worker()
            self._take({"t": round(time.time(), 4), "event": event, **fields})
            self._show()

    def poll(self) -> None:
        """Reads what the worker wrote since the last look."""
        with self._lock:
            if self._read_worker():
                self._show()

    def close(self) -> None:
        """Uploads everything that is left. Raises StoreError when the bucket does not take it."""
        self._stop.set()
        self._thread.join()
        self.poll()
        self._flush()
        self._beat()

    def _work(self) -> None:
        while not self._stop.wait(POLL_S):
            self.poll()
            now = time.monotonic()
            try:
                if now - self._flushed_at >= min(max((now - self._began) / 20, PART_S[0]), PART_S[1]):
                    self.write("alive")
                    self._flush()
                if now - self._beat_at >= HEARTBEAT_S:
                    self._beat()
            except SpotuneError as error:
                self._flushed_at = self._beat_at = now
                say(f"progress is not reported for now: {error}")

    def _read_worker(self) -> int:
        """Takes the worker's complete new lines; an unfinished last line waits for its end."""
        try:
            with open(self._worker_log, "rb") as log:
                log.seek(self._offset)
                data = log.read()
        except FileNotFoundError:
            return 0
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        lines = whole.splitlines()
        for line in lines:
            try:
                event = json.loads(line)
            except (ValueError, RecursionError):  # a line cut by a dying worker
                continue
            if is_whole(event):
                self._take(event)
        return len(lines)

    def _take(self, event: dict[str, Any]) -> None:
        self._pending.append(json.dumps(event))
        for listener in self._listeners:
            listener(event)
        changes: dict[str, Any] = {}
        match event["event"]:
            case "phase":
                changes = {"phase": event["phase"]}
            case "plan":
                changes = {"max_steps": int(event.get("max_steps") or 0)}
            case "step":
                changes = {"step": event["step"], "tokens": event.get("tokens") or self._shown.tokens}
                self.first_step = self.first_step or event["step"]
            case "log" if "loss" in event:
                changes = {"loss": as_json(as_number(event["loss"]))}  # a run may diverge
            case "restored" if event.get("step"):
                changes = {"step": event["step"], "committed_step": event["step"]}
            case "commit":
                changes = {"committed_step": event["step"]}
            case "end":
                changes = {"phase": event["reason"]}
        self._shown = replace(self._shown, at=time.time(), **changes)

    def _show(self) -> None:
        if not self._status_file:
            return
        path = Path(self._status_file)
        part = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            part.write_text(json.dumps(asdict(self._shown)))
            part.replace(path)
        except OSError as error:  # the bucket has it too
            say(f"status file {path}: {error}")
            self._status_file = ""

    def _flush(self) -> None:
        with self._flushing:
            with self._lock:
                lines, self._pending = self._pending, []
                self._flushed_at = time.monotonic()
            if not lines:
                return
            data = ("\n".join(lines) + "\n").encode()
            try:
                while not self._store.create(self._keys.events(self._attempt, 0, self._part), data):
                    self._part += 1
                self._part += 1
            except SpotuneError:
                with self._lock:
                    self._pending = lines + self._pending
                raise

    def _beat(self) -> None:
        with self._lock:
            self._beat_at = time.monotonic()
            shown = replace(self._shown, at=time.time())
        self._store.write(self._keys.progress, shown.to_bytes())
