"""Offline, wandb gets one clean run, rebuilt from our own events; wandb itself writes it."""

import json
import os
from pathlib import Path

import pytest

from spotune.core.keys import Keys
from spotune.core.records import RunRecord
from spotune.core.store import Store
from spotune.guard.extras import rebuild_offline

KEYS = Keys("a-run")


def make_run(report_to: str) -> RunRecord:
    config = {"report_to": report_to, "learning_rate": 0.125}
    return RunRecord(
        run_id="a-run", created_at=0, user="u", config_path="c", config=config, config_sha256="", data_sha256=""
    )


def write_logs(store: Store, attempt: int, losses: dict[int, float]) -> None:
    lines = [json.dumps({"event": "log", "t": 0, "step": step, "loss": loss}) for step, loss in losses.items()]
    store.write(KEYS.events(attempt, 0, 0), "\n".join(lines).encode())


def test_a_run_of_two_attempts_is_one_offline_run(
    local_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_logs(local_store, 1, {5: 3.25, 10: 777.5})
    write_logs(local_store, 2, {10: 2.25, 15: 1.25})

    rebuild_offline(local_store, KEYS, make_run("wandb"), {**os.environ, "HOME": str(tmp_path)})
    (log,) = [key for key in local_store.keys(f"{KEYS.root}/wandb") if key.endswith(".wandb")]
    assert "offline-run-" in log
    assert log.endswith("run-a-run.wandb")
    data = local_store.read(log) or b""
    assert b"train/loss" in data
    assert all(text in data for text in (b"3.25", b"2.25", b"1.25"))
    assert b"777.5" not in data  # the step that was done again counts once
    assert "wandb sync" in capsys.readouterr().err


def test_nothing_is_written_for_those_who_do_not_ask(local_store: Store) -> None:
    rebuild_offline(local_store, KEYS, make_run("none"), {})
    rebuild_offline(local_store, KEYS, make_run("wandb"), {"WANDB_MODE": "disabled"})
    rebuild_offline(local_store, KEYS, make_run("wandb"), {"WANDB_API_KEY": "k"})  # live: wandb has it already
    assert local_store.keys(KEYS.root) == []
