"""wandb from the guard's side: one run id across attempts; offline, one clean run rebuilt from our events."""

import json
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from spotune.contracts.errors import StoreError
from spotune.contracts.events import number, parse_objects
from spotune.contracts.keys import Keys, attempt_of
from spotune.contracts.records import RunRecord
from spotune.contracts.store import Store
from spotune.contracts.trackers import wandb_mode
from spotune.guard.say import say
from spotune.guard.worker_command import worker_command

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
        command = worker_command(environ, "spotune.sft.wandb_rebuild", str(folder))
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
