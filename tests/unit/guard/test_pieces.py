"""The guard's small pieces: machine, notices, journal, weights, faults, arguments."""

import hashlib
import json
import math
import signal
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from spotune.core.environment import RunEnvironment
from spotune.core.errors import InputError, SpotuneError, StoreError
from spotune.core.keys import Keys
from spotune.core.protocol import EventLog
from spotune.core.records import AttemptRecord, Commit, Progress, RunRecord
from spotune.core.store import Store
from spotune.guard.attempt import make_job
from spotune.guard.budget import _usd_per_s
from spotune.guard.claim import RunRequest, choose_run_id, claim_attempt
from spotune.guard.extras import surviving_logs, tracker_environ
from spotune.guard.finish import weights_sha256
from spotune.guard.journal import Context, Journal, Node
from spotune.guard.leaving import SIGNALS, Notices
from spotune.guard.main import main, parse_arguments
from spotune.guard.restore import is_second_fault, last_event

KEYS = Keys("a-run")
RUN = RunRecord(run_id="a-run", created_at=0, user="u", config_path="c", config={}, config_sha256="", data_sha256="")
MANAGED = {
    "SKYPILOT_TASK_ID": "sky-managed-2026-11-23-12-42-22-410539_my-tune_75-0",
    "SKYPILOT_MANAGED_JOB_ID": "75",
    "SKYPILOT_CLUSTER_INFO": '{"cluster_name": "my-tune-75", "cloud": "Slurm", "region": "lab", "zone": "spot"}',
}


def test_a_machine_is_what_skypilot_says() -> None:
    environ = {
        **MANAGED,
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
    }
    machine = Node.read(environ, num_processes=8)
    assert (machine.node_rank, machine.ranks, machine.world_size) == (1, 4, 8)
    assert machine.node_ips == ("10.0.0.1", "10.0.0.2")
    assert (machine.infra, machine.region, machine.zone, machine.cluster_name) == ("slurm", "lab", "spot", "my-tune-75")
    assert Node.read({}).world_size == 1
    with pytest.raises(InputError, match="3 ranks do not spread over 2 machines"):
        Node.read(environ, num_processes=3)


def test_a_bare_managed_job_keeps_its_run_id_over_recoveries() -> None:
    request = RunRequest("config/runs/demo.yaml", "", ())
    env = RunEnvironment.read({})
    assert choose_run_id(env, Node.read(MANAGED), request) == "my-tune-j75"
    long = {**MANAGED, "SKYPILOT_TASK_ID": f"sky-managed-2026-11-23-12-42-22-410539_{'long' * 9}_75-0"}
    assert len(choose_run_id(env, Node.read(long), request)) <= 25
    assert choose_run_id(env, Node.read({}), request).startswith("demo-")
    with pytest.raises(InputError, match="SPOTUNE_RUN_ID"):
        choose_run_id(RunEnvironment.read({"SPOTUNE_RUN_ID": "Not Valid"}), Node.read({}), request)


def test_the_first_notice_counts_and_more_are_harmless() -> None:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        notices = Notices(clock=lambda: 7.0).install()
        assert not notices.wait(0.01)
        signal.raise_signal(signal.SIGURG)
        signal.raise_signal(signal.SIGTERM)
        assert notices.wait(0)
        assert (notices.source, notices.notice.at) == ("SIGURG", 7.0)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_the_journal_keeps_order_progress_and_parts(local_store: Store, tmp_path: Path) -> None:
    log, status = EventLog(tmp_path / "events"), tmp_path / "status.json"
    journal = Journal(local_store, KEYS, 3, tmp_path / "events", str(status))
    log.write("plan", max_steps=50)
    log.phase("train")
    log.write("step", step=7, tokens=70, data_wait_s=0.0)
    log.write("log", step=7, loss=1.5)
    journal.write("commit", step=7, upload_s=0.1, bytes=1)
    shown = json.loads(status.read_text())
    assert (shown["step"], shown["max_steps"], shown["loss"], shown["phase"]) == (7, 50, 1.5, "train")
    log.write("log", step=7, loss=float("nan"))  # it has diverged: what is seen of it says so, and stays a record
    journal.write("note")
    assert json.loads(status.read_text())["loss"] == "nan"
    with open(tmp_path / "events", "a") as file:
        file.write('{"t": 1, "event": "st')  # a worker that was killed in mid-write
    journal.write("end", reason="preempted", exit_code=75, step=7, message="")
    journal.close()
    log.close()
    parts = [key for key in local_store.keys(KEYS.attempts) if "events-0-" in key]
    events = [json.loads(line) for key in parts for line in (local_store.read(key) or b"").splitlines()]
    assert [event["event"] for event in events] == ["plan", "phase", "step", "log", "commit", "log", "note", "end"]
    assert last_event(local_store, KEYS, 3)["reason"] == "preempted"
    progress = Progress.from_bytes(local_store.read(KEYS.progress) or b"")
    assert (progress.phase, progress.committed_step, progress.loss) == ("preempted", 7, "nan")
    assert next(event for event in events[::-1] if event["event"] == "log")["loss"] == "nan"


@pytest.mark.parametrize(
    ("end", "commit", "second"),
    [
        ({"event": "end", "reason": "failed", "exit_code": 75}, False, True),
        ({"event": "end", "reason": "failed", "exit_code": 75}, True, False),
        ({"event": "end", "reason": "preempted", "exit_code": 75}, False, False),
        ({"event": "step", "step": 3}, False, False),  # vanished: a machine, not a fault
    ],
)
def test_two_faults_without_a_commit(local_store: Store, end: dict[str, object], commit: bool, second: bool) -> None:
    local_store.write(KEYS.events(1, 0, 0), json.dumps(end).encode())
    if commit:
        local_store.write(KEYS.commit(1, 5), b"{}")
    assert is_second_fault(local_store, KEYS, 2) is second
    assert not is_second_fault(local_store, KEYS, 1)


def _safetensors(path: Path, tensors: dict[str, bytes], dtype: str = "U8") -> Path:
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, raw in tensors.items():
        header[name] = {"dtype": dtype, "shape": [len(raw)], "data_offsets": [len(data), len(data) + len(raw)]}  # type: ignore[dict-item]
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_weights_have_one_fingerprint_however_they_are_sharded(tmp_path: Path) -> None:
    whole = weights_sha256([_safetensors(tmp_path / "a", {"b": b"22", "a": b"1"})])
    shards = [_safetensors(tmp_path / "s1", {"b": b"22"}), _safetensors(tmp_path / "s2", {"a": b"1"})]
    assert weights_sha256(shards) == whole == hashlib.sha256(b"a\nU8\n1\n1" + b"b\nU8\n2\n22").hexdigest()
    assert weights_sha256([_safetensors(tmp_path / "c", {"b": b"23", "a": b"1"})]) != whole
    (tmp_path / "bad").write_bytes(b"not it")
    with pytest.raises(StoreError, match="bad: not a safetensors file"):
        weights_sha256([tmp_path / "bad"])


# dtype, then as its bytes: the largest number, NaN, infinity (none in F8_E4M3)
FLOATS = [
    ("F64", struct.pack("<d", 1.7976931348623157e308), struct.pack("<d", math.nan), struct.pack("<d", math.inf)),
    ("F32", struct.pack("<f", 3.4028234663852886e38), struct.pack("<f", math.nan), struct.pack("<f", math.inf)),
    ("F16", struct.pack("<e", 65504.0), struct.pack("<e", math.nan), struct.pack("<e", math.inf)),
    ("BF16", b"\x7f\x7f", b"\xc0\x7f", b"\x80\x7f"),
    ("F8_E5M2", b"\x7b", b"\x7e", b"\x7c"),
    ("F8_E4M3", b"\x7e", b"\x7f", b"\x7f"),
]


def _negative(value: bytes) -> bytes:
    return value[:-1] + bytes([value[-1] | 0x80])


@pytest.mark.parametrize(("dtype", "largest", "nan", "infinity"), FLOATS, ids=[row[0] for row in FLOATS])
def test_weights_that_are_not_finite_have_no_fingerprint(
    tmp_path: Path, dtype: str, largest: bytes, nan: bytes, infinity: bytes
) -> None:
    good = (largest + _negative(largest) + bytes(len(largest))) * 100
    assert weights_sha256([_safetensors(tmp_path / "good", {"a": good}, dtype)])
    for bad in (nan, _negative(nan), infinity):
        for place in (0, 1, 299):
            raw = good[: place * len(bad)] + bad + good[place * len(bad) :]
            with pytest.raises(SpotuneError, match="w.safetensors: tensor b holds NaN or infinity") as caught:
                weights_sha256([_safetensors(tmp_path / "w.safetensors", {"a": good, "b": raw}, dtype)])
            assert not isinstance(caught.value, StoreError)  # no other try makes it better
    assert weights_sha256([_safetensors(tmp_path / "integers", {"a": nan * 10 + infinity}, "U8")])
    if dtype != "F8_E4M3":
        assert weights_sha256([_safetensors(tmp_path / "mask", {"a": good + _negative(infinity)}, dtype)])


@pytest.mark.parametrize(
    ("config", "save_every", "rule"),
    [
        ({}, "", (None, None, False)),  # when the guard asks for it
        ({"save_steps": 5}, "", (None, None, True)),
        ({"save_strategy": "epoch"}, "", (None, None, True)),
        ({"save_steps": 5}, "7", (7, None, False)),
        ({}, "9s", (None, 9.0, False)),
    ],
)
def test_when_to_save(
    local_store: Store, tmp_path: Path, config: dict[str, object], save_every: str, rule: tuple[object, ...]
) -> None:
    run = replace(RUN, config=config, save_every=save_every)
    record = AttemptRecord(run_id="a-run", attempt=1, claimed_at=0, claim_id="x")
    context = Context(local_store, KEYS, run, record, Node.read({}), {}, tmp_path, tmp_path, "", 60.0)
    job = make_job(context, None, [])
    assert (job.save_steps, job.save_seconds, job.save_as_config) == rule
    assert (job.threads, job.global_batch) == (None, None)
    job = make_job(context, Commit(run_id="a-run", step=1, attempt=1, threads=2, global_batch=8, files={}), [])
    assert (job.threads, job.global_batch) == (2, 8)


def test_how_long_earlier_machines_lasted(local_store: Store) -> None:
    """Those that were taken away, with notice or without; not one that failed by itself."""
    ends: list[dict[str, object]] = [
        {"event": "end", "reason": "preempted", "t": 160.0},
        {"event": "end", "reason": "failed", "t": 170.0},
        {"event": "step", "step": 3, "t": 130.5},
    ]
    for number, end in enumerate(ends, 1):
        attempt = claim_attempt(local_store, KEYS, Node.read({}))
        assert attempt.attempt == number
        record = replace(attempt, claimed_at=100.0)
        local_store.write(KEYS.attempt(number), record.to_bytes())
        local_store.write(KEYS.events(number, 0, 0), json.dumps(end).encode())
    assert claim_attempt(local_store, KEYS, Node.read({})).spells_s == [60.0, 30.5]


def test_flags_are_trls_own() -> None:
    argv = ["c.yaml", "--profile", "dev", "--set", "max_steps=5", "--learning_rate", "1e-4", "--packing", "--seed=7"]
    request = parse_arguments(argv)
    assert (request.config_path, request.profile) == ("c.yaml", "dev")
    assert request.overrides == ("learning_rate=1e-4", "packing=true", "seed=7", "max_steps=5")
    assert parse_arguments(["--config", "c.yaml", "--use_peft"]).config_path == "c.yaml"
    with pytest.raises(InputError, match="unexpected 'b.yaml'"):
        parse_arguments(["a.yaml", "b.yaml"])
    with pytest.raises(InputError, match="--learning_rate: needs a value"):
        parse_arguments(["a.yaml", "--learning_rate", "--packing"])


def test_bad_input_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Notices, "install", lambda self: self)
    assert main([str(tmp_path / "none.yaml")]) == 2
    assert capsys.readouterr().err == f"{tmp_path}/none.yaml: no such file\n"
    assert not (tmp_path / "home").exists()


def test_wandb_is_one_run(local_store: Store) -> None:
    run = replace(RUN, config={"report_to": "wandb"})
    live = tracker_environ(run, {"WANDB_API_KEY": "k"})
    assert live == {"WANDB_RUN_ID": "a-run", "WANDB_RESUME": "allow", "WANDB_NAME": "a-run"}
    assert tracker_environ(run, {"WANDB_API_KEY": "k", "WANDB_RUN_ID": "mine"})["WANDB_RUN_ID"] == "mine"
    assert tracker_environ(run, {}) == {}
    for attempt, losses in ((1, {5: 3.0, 10: 2.0}), (2, {10: 2.5, 15: 1.0})):
        lines = [json.dumps({"event": "log", "t": 0, "step": step, "loss": loss}) for step, loss in losses.items()]
        local_store.write(KEYS.events(attempt, 0, 0), "\n".join(lines).encode())
    assert [(log["step"], log["loss"]) for log in surviving_logs(local_store, KEYS)] == [(5, 3.0), (10, 2.5), (15, 1.0)]


def test_a_machine_that_may_be_either_counts_as_the_dearer() -> None:
    """It cannot tell whether it is a spot machine."""
    prices = [
        {"infra": "aws", "use_spot": spot, "price_usd_per_hour": usd, "source": "catalog"}
        for spot, usd in ((True, 36.0), (False, 72.0))
    ]
    attempt = AttemptRecord(run_id="a-run", attempt=1, claimed_at=0, claim_id="c", infra="aws")
    facts = ({"use_spot": True}, {"use_spot": False}, {"use_spot": True, "may_be_on_demand": True})
    assert [_usd_per_s(replace(RUN, prices=prices, **one), attempt) for one in facts] == [0.01, 0.02, 0.02]
