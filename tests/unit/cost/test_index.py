"""The index of all runs: it follows the bucket, reads what may have changed, and may be lost."""

import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from s3fs import S3FileSystem

from spotune.core.keys import Keys
from spotune.core.records import TerminalMarker
from spotune.core.store import Store
from spotune.cost import collect
from spotune.cost.account import bills_due, build_accounts, write_bills, write_due_bills
from spotune.cost.collect import all_runs
from spotune.cost.index import Index, index_file, read_run_data
from spotune.cost.machines import RunData
from spotune.launch.engine import JobStatus, PaidInterval
from spotune.launch.settings import Workspace
from tests.conftest import reach
from tests.unit.cost.cases import T, claim, event, phase, row, step, three_attempts


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace.open({"SPOTUNE_HOME": str(tmp_path / "home")}, tmp_path)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The runs that were read."""
    seen: list[str] = []

    def read(store: Store, run_id: str, *rest: Any) -> RunData:
        seen.append(run_id)
        return read_run_data(store, run_id, *rest)

    read_run_data = collect.read_run_data
    monkeypatch.setattr(collect, "read_run_data", read)
    return seen


def write(store: Store, run_id: str, run_data: RunData, bills: bool = True) -> None:
    """A run of that name in the bucket."""
    keys = Keys(run_id)
    store.create(keys.run, replace(run_data.run, run_id=run_id).to_bytes())
    for record in run_data.attempts:
        store.create(keys.attempt(record.attempt), replace(record, run_id=run_id).to_bytes())
    for attempt, events in run_data.events.items():
        store.create(keys.events(attempt, 0, 0), "\n".join(map(json.dumps, events)).encode())
    if run_data.certificate:
        store.create(keys.completed, run_data.certificate.to_bytes())
    if bills:
        write_bills(store, [replace(bill, run_id=run_id) for bill in bills_due(run_data, build_accounts(run_data, T))])


def listed(workspace: Workspace, **options: Any) -> dict[str, dict[str, Any]]:
    found = all_runs(workspace, lambda index: index.runs(0.0), now=T + 1000, **options)
    return {run_id: totals for (_, run_id), totals in found}


def file_of(workspace: Workspace) -> Path:
    return index_file(workspace.env.cache, workspace.env.bucket)


def test_each_bucket_has_its_own_runs(workspace: Workspace, tmp_path: Path, reads: list[str]) -> None:
    environ = {"SPOTUNE_HOME": str(tmp_path / "home"), "SPOTUNE_BUCKET": f"file://{tmp_path}/other"}
    other = Workspace.open(environ, tmp_path)
    write(workspace.store(), "here", three_attempts())
    write(other.store(), "there", three_attempts())
    for _ in range(2):
        assert set(listed(workspace)) == {"here"}
        assert set(listed(other)) == {"there"}
    assert reads == ["here", "there"]


def test_a_certified_and_billed_run_is_read_once(workspace: Workspace, reads: list[str]) -> None:
    write(workspace.store(), "done", three_attempts())
    first = listed(workspace)
    assert (first["done"]["state"], first["done"]["attempts"]) == ("SUCCEEDED", 3)
    assert listed(workspace) == first
    assert reads == ["done"]


def failed() -> RunData:
    """One attempt that failed for good."""
    end = event(30, "end", reason="failed", exit_code=1)
    events = {1: [event(15, "start"), phase(15, "load"), phase(20, "train"), step(25, 1), end]}
    run_data = three_attempts()
    return replace(
        run_data, intervals=[row(10, 30, exit_code=1)], attempts=[claim(1, 15)], events=events, commits=[],
        certificate=None,
    )  # fmt: skip


def test_a_failed_run_is_read_again_after_a_resume(workspace: Workspace, reads: list[str]) -> None:
    store, keys = workspace.store(), Keys("stands")
    write(store, "stands", failed())
    mark = TerminalMarker(run_id="stands", attempt=1, at=T + 30, reason="a bug", exit_code=1)
    store.create(keys.failed, mark.to_bytes())
    assert listed(workspace)["stands"]["state"] == "FAILED"
    assert listed(workspace)["stands"]["attempts"] == 1
    assert len(reads) == 1
    store.delete([keys.failed])  # somewhere else, it is resumed
    store.create(keys.attempt(2), replace(claim(2, 400), run_id="stands").to_bytes())
    assert listed(workspace)["stands"]["attempts"] == 2
    assert len(reads) == 2


def test_a_bill_from_another_machine_is_used(workspace: Workspace, reads: list[str]) -> None:
    write(workspace.store(), "run-a", three_attempts(), bills=False)
    unsure = listed(workspace)["run-a"]
    assert unsure["unreconciled_s"] > 0
    run_data = three_attempts()
    bills = [replace(bill, run_id="run-a") for bill in bills_due(run_data, build_accounts(run_data, T + 1000))]
    write_bills(workspace.store(), bills)
    sure = listed(workspace)["run-a"]
    assert sure["unreconciled_s"] == 0
    assert sure["paid_s"] == 70.0


def test_a_run_removed_from_the_bucket_is_not_listed(workspace: Workspace) -> None:
    store = workspace.store()
    for name in ("run-a", "run-b"):
        write(store, name, three_attempts())
    assert set(listed(workspace)) == {"run-a", "run-b"}
    store.delete(store.keys(Keys("run-a").root))
    assert set(listed(workspace)) == {"run-b"}
    assert all_runs(workspace, lambda index: {key[1] for key, _ in index.attempts(0.0)}) == {"run-b"}


@pytest.mark.parametrize("content", [b"not a database, not at all" * 200, b"", None])
def test_a_lost_or_broken_index_is_made_anew(workspace: Workspace, content: bytes | None) -> None:
    write(workspace.store(), "done", three_attempts())
    first = listed(workspace)
    path = file_of(workspace)
    path.unlink() if content is None else path.write_bytes(content)
    assert listed(workspace) == first
    assert Index(str(path)).stamps()


def test_an_index_of_another_version_is_made_anew(workspace: Workspace) -> None:
    write(workspace.store(), "done", three_attempts())
    first = listed(workspace)
    Index(str(file_of(workspace)))._connection.execute("PRAGMA user_version = 9999")
    assert listed(workspace) == first


def test_an_index_of_a_newer_version_is_left_alone(workspace: Workspace, reads: list[str]) -> None:
    write(workspace.store(), "done", three_attempts())
    first, path, said = listed(workspace), file_of(workspace), list[str]()
    Index(str(path))._connection.execute("PRAGMA user_version = 9999")
    before = path.read_bytes()
    assert listed(workspace, warn=said.append) == first
    assert said == [f"{path}: made by a newer spotune, version 9999 and not 6: left alone, everything is read"
                    " (upgrade spotune)"]  # fmt: skip
    assert path.read_bytes() == before
    Index(str(path.with_name("other")))._connection.execute("PRAGMA user_version = 5")
    path.with_name("other").replace(path)
    said.clear()
    assert listed(workspace, warn=said.append) == first
    assert said == [f"{path}: made by an older spotune, version 5: made anew as version 6"]


@pytest.mark.parametrize("content", [b"not a database, not at all" * 200, None])
def test_a_damaged_index_is_set_aside_with_a_line(workspace: Workspace, content: bytes | None) -> None:
    write(workspace.store(), "done", three_attempts())
    path, said = file_of(workspace), list[str]()
    path.parent.mkdir(parents=True)
    path.mkdir() if content is None else path.write_bytes(content)
    assert set(listed(workspace, warn=said.append)) == {"done"}
    assert len(said) == 1
    assert said[0].startswith(f"{path}: ")
    assert said[0].endswith(f": set aside as {path.name}.damaged-1")
    assert Index(str(path)).stamps()


def test_without_a_place_for_it_everything_is_read_each_time(workspace: Workspace, reads: list[str]) -> None:
    write(workspace.store(), "done", three_attempts())
    workspace.env.cache.parent.mkdir(parents=True, exist_ok=True)
    workspace.env.cache.write_text("a file where the folder would be")
    assert set(listed(workspace)) == {"done"}
    assert listed(workspace)["done"]["attempts"] == 3
    assert len(reads) == 2


def test_a_run_that_cannot_be_read_is_left_out_with_a_warning(workspace: Workspace) -> None:
    write(workspace.store(), "done", three_attempts())
    workspace.store().write(Keys("broken").run, b"{")
    said: list[str] = []
    assert set(listed(workspace, warn=said.append)) == {"done"}
    assert len(said) == 1
    assert said[0].startswith("broken is left out: runs/broken/run.json: not a RunRecord")


def test_many_runs_are_read_by_processes_with_progress(workspace: Workspace) -> None:
    names = [f"run-{number:03d}" for number in range(collect.MANY + 1)]
    for name in names:
        write(workspace.store(), name, failed())
    seen: list[tuple[int, int]] = []
    found = listed(workspace, progress=lambda done, total: seen.append((done, total)))
    assert set(found) == set(names)
    assert seen[-1] == (len(names), len(names))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_two_processes_can_use_the_index_at_once(workspace: Workspace) -> None:
    for number in range(20):
        write(workspace.store(), f"run-{number:02d}", three_attempts())
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: listed(workspace), range(8)))
    assert all(one == found[0] for one in found)
    assert len(all_runs(workspace, lambda index: index.attempts(0.0))) == 60


def test_a_record_of_another_shape_costs_a_line_and_not_the_list(workspace: Workspace) -> None:
    store = workspace.store()
    write(store, "good", three_attempts())
    odd = three_attempts()
    write(store, "odd-prices", replace(odd, run=replace(odd.run, prices=[{"infra": "aws"}])), bills=False)
    write(store, "odd-bill", odd, bills=False)
    bill = {"run_id": "odd-bill", "attempt": 1, "started_at": "x", "ended_at": None, "price": {}}
    store.create(Keys("odd-bill").bill(1), json.dumps(bill).encode())
    events = {1: [*odd.events[1], event(16, "step", step=1) | {"tokens": 1e300}]}
    write(store, "odd-tokens", replace(odd, events=events, commits=[], certificate=None), bills=False)
    said: list[str] = []
    found = listed(workspace, warn=said.append)
    assert set(found) == {"good", "odd-bill", "odd-tokens"}
    assert len(said) == 2
    assert said[0].startswith(f"odd-bill is shown without one of its records: {Keys('odd-bill').bill(1)}: not a Bill: ")
    assert said[1].startswith("odd-prices is left out: runs/odd-prices/run.json: prices[0]: not a PriceRow: ")
    assert found["odd-tokens"]["tokens"] < 1e15


def test_an_unreadable_record_is_reported_each_time_until_it_is_mended(workspace: Workspace, reads: list[str]) -> None:
    store, keys = workspace.store(), Keys("done")
    write(store, "done", three_attempts())
    bill = store.read(keys.bill(2))
    assert bill
    store.write(keys.bill(2), bill[:50])
    said: list[str] = []
    for _ in range(2):
        assert listed(workspace, warn=said.append)["done"]["unreconciled_s"] > 0
    assert len(said) == 2
    assert {line.partition(": not a Bill")[0] for line in said} == {
        f"done is shown without one of its records: {keys.bill(2)}"
    }
    store.write(keys.bill(2), bill)  # its name tells nobody
    assert listed(workspace, warn=said.append)["done"]["unreconciled_s"] == 0
    assert len(said) == 2


def test_a_run_that_became_unreadable_is_shown_as_it_was(workspace: Workspace) -> None:
    store, keys = workspace.store(), Keys("stands")
    write(store, "stands", failed())
    first = listed(workspace)
    record = store.read(keys.run)
    assert record
    store.write(keys.run, record[:50])
    store.create(keys.attempt(2), replace(claim(2, 400), run_id="stands").to_bytes())  # else nobody looks
    said: list[str] = []
    assert listed(workspace, warn=said.append) == first
    assert [line.partition(": not a")[0] for line in said] == [f"stands is shown as it was: {keys.run}"]
    store.write(keys.run, record)
    assert listed(workspace, warn=said.append)["stands"]["attempts"] == 2
    assert len(said) == 1


class Engine:
    """One that knows a run."""

    name = "local"

    def __init__(self, job: JobStatus, rows: list[PaidInterval]) -> None:
        self.job, self.rows = job, rows

    def jobs(self, run_ids: Sequence[str] | None = None, everyone: bool = False) -> list[JobStatus]:
        return [self.job]

    def history(self, run_id: str) -> list[PaidInterval]:
        return [replace(one, run_id=run_id) for one in self.rows]


def test_a_run_whose_bucket_is_gone_is_shown_as_it_was(
    workspace: Workspace, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine remembers it; the others are not to suffer for it."""
    reach("s3", request, monkeypatch)
    files, bucket = S3FileSystem(), f"gone-{time.time_ns()}"
    files.mkdir(bucket)
    other = Store(f"s3://{bucket}/team")
    write(other, "elsewhere", failed())
    write(workspace.store(), "here", three_attempts())
    engine = Engine(JobStatus("elsewhere", "FAILED", 0, "ana", "local", T, attempt=1, bucket=other.url), [])
    monkeypatch.setattr(Workspace, "engines", lambda self: [engine])
    monkeypatch.setattr(Workspace, "infra", lambda self, infra: engine)
    first = listed(workspace)
    assert set(first) == {"elsewhere", "here"}
    files.rm(bucket, recursive=True)
    assert listed(workspace) == first


@pytest.mark.parametrize("is_known_before", [True, False])
def test_a_certified_run_is_read_while_its_engine_is_active(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, reads: list[str], is_known_before: bool
) -> None:
    """The machine was taken after the certificate and before its exit: the engine brings up another."""
    store = workspace.store()
    write(store, "done", three_attempts())
    if is_known_before:
        assert listed(workspace)["done"]["paid_s"] == 70
    job = JobStatus("done", "RECOVERING", 0, "ana", "local", T, attempt=3, bucket=store.url)
    engine = Engine(job, list(three_attempts().intervals))
    monkeypatch.setattr(Workspace, "engines", lambda self: [engine])
    monkeypatch.setattr(Workspace, "infra", lambda self, infra: engine)
    assert listed(workspace)["done"]["paid_s"] == 70
    engine.rows.append(row(200, 800, end_reason="exited", exit_code=0))  # between two looks
    engine.job = replace(job, state="SUCCEEDED")
    assert listed(workspace)["done"]["paid_s"] == 670
    seen = len(reads)
    listed(workspace)
    assert listed(workspace)["done"]["paid_s"] == 670
    assert len(reads) <= seen + 1


def test_a_bill_of_an_attempt_after_the_certificate_is_used(workspace: Workspace) -> None:
    """It does what the certified run still owes: merge, push."""
    store, keys = workspace.store(), Keys("done")
    write(store, "done", three_attempts())
    assert listed(workspace)["done"]["paid_s"] == 70
    store.create(keys.attempt(4), replace(claim(4, 105), run_id="done").to_bytes())
    run_data = replace(read_run_data(store, "done"), intervals=[replace(row(100, 130), run_id="done")])
    write_due_bills(store, run_data, build_accounts(run_data, T + 1000), is_over=True)
    assert listed(workspace)["done"]["paid_s"] == 100


def test_a_late_bill_of_a_machine_without_a_claim_is_used(workspace: Workspace, reads: list[str]) -> None:
    """Here a run is final; where its engine is known, a row of a machine that never claimed is found only then."""
    store = workspace.store()
    write(store, "done", three_attempts())
    assert listed(workspace)["done"]["paid_s"] == 70
    assert listed(workspace)["done"]["paid_s"] == 70
    assert reads == ["done"]
    run_data = replace(read_run_data(store, "done"), intervals=[replace(row(31, 36, end_reason="lost"), run_id="done")])
    write_due_bills(store, run_data, build_accounts(run_data, T + 1000), is_over=True)
    assert store.keys(Keys("done").lost)
    assert listed(workspace)["done"]["paid_s"] == 75
    assert listed(workspace)["done"]["paid_s"] == 75
    assert len(reads) == 2  # its names are compared from now on
