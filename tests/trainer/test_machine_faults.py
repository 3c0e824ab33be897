"""A full or read-only disk, missing memory, a killed process and a dropped network are the machine's: exit code 75.

The faults are real: small file systems, limits of the kernel, signals, closed ports. So are the opposites: errors that
only quote such words.
"""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import fsspec
import jinja2
import pyarrow as pa
import pytest
import safetensors.torch
import tokenizers
import torch

from spotune.core.protocol import Outcome
from spotune.core.store.faults import is_machine_fault
from spotune.sft.preflight import outcome_of
from tests import tiny
from tests.filesystems import file_system, fill, remounted
from tests.ranks import Nursery, make_folder
from tests.waiting import until

Raise = Callable[[Path], object]


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    with file_system(tmp_path / "small", "64k") as folder:
        yield folder


def fault_of(make: Raise, folder: Path) -> Exception:
    """The error that it raises."""
    try:
        make(folder)
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def write_arrow(folder: Path) -> None:
    table = pa.table({"a": list(range(100_000))})
    with pa.OSFile(str(folder / "a.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def write_tokenizer(folder: Path) -> None:
    words = {f"w{index}": index for index in range(20_000)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0")).save(str(folder / "tokenizer.json"))


def write_rows(folder: Path) -> None:
    file = tiny.write_jsonl(folder.parent / "rows.jsonl", tiny.rows(2000))
    datasets.load_dataset("json", data_files=str(file), cache_dir=str(folder))


def write_map(folder: Path, processes: int | None = None) -> None:
    rows = datasets.Dataset.from_dict({"a": list(range(20_000))})
    rows.map(lambda row: {"b": "x" * 50}, num_proc=processes, cache_file_name=str(folder / "map.arrow"))


WRITERS: dict[str, Raise] = {
    "python": lambda folder: (folder / "a").write_bytes(b"x" * 100_000),
    "arrow": write_arrow,
    "safetensors": lambda folder: safetensors.torch.save_file({"a": torch.zeros(100_000)}, folder / "a.safetensors"),
    "torch": lambda folder: torch.save(torch.zeros(100_000), folder / "a.pt"),
    "tokenizers": write_tokenizer,
    "rows that are read": write_rows,
    "rows that are tokenized": write_map,
    "rows that are tokenized by two processes": lambda folder: write_map(folder, 2),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk(small: Path, name: str) -> None:
    error = fault_of(WRITERS[name], small)
    assert outcome_of(error, 0).how == "retry", error


@pytest.mark.parametrize("name", ["python", "arrow", "safetensors", "tokenizers"])
def test_a_read_only_disk(small: Path, name: str) -> None:
    assert remounted(small, "ro")
    error = fault_of(WRITERS[name], small)
    assert outcome_of(error, 0).how == "retry", error


def kill_this(_: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


class Rows(torch.utils.data.Dataset[Any]):
    """Rows that ``read`` makes."""

    def __init__(self, read: Callable[[int], Any]) -> None:
        self.read = read

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        return self.read(index)


def fill_a_disk(_: int) -> None:
    with open("/dev/full", "w") as full:
        full.write("x" * 100_000)


def quote(_: int) -> None:
    raise KeyError("No space left on device")


def in_a_worker(read: Callable[[int], Any]) -> list[Any]:
    return list(torch.utils.data.DataLoader(Rows(read), num_workers=1))


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def read_url(_: Path) -> bytes:
    with fsspec.open(f"http://127.0.0.1:{closed_port()}/rows.jsonl") as file:
        return bytes(file.read())


def open_many(_: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 2, hard))
    files = []
    try:
        files += [os.open("/dev/null", os.O_RDONLY) for _ in range(10)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for file in files:
            os.close(file)


MACHINES: dict[str, Raise] = {
    "a killed process that tokenizes": lambda _: datasets.Dataset.from_dict({"a": [1, 2]}).map(kill_this, num_proc=2),
    "a killed data loader": lambda _: in_a_worker(kill_this),
    "a full disk in a data loader": lambda _: in_a_worker(fill_a_disk),
    "too many open files": open_many,
    "a server that is away": read_url,
}
INPUTS: dict[str, Raise] = {
    "a value": lambda _: pa.array([1, "No space left on device"]),
    "a text that is cast": lambda _: pa.array(["Cannot allocate memory"]).cast(pa.int64()),
    "a key": lambda _: quote(0),
    "a key in a data loader": lambda _: in_a_worker(quote),
    "a template": lambda _: jinja2.Environment().from_string("{{ {}['Read-only file system'].x }}").render(),
    "a name": lambda folder: (folder / "No space left on device").read_text(),
    "a JSON text": lambda _: json.loads('{"Input/output error": '),
}


@pytest.mark.parametrize("name", MACHINES)
def test_what_is_the_machines(tmp_path: Path, name: str) -> None:
    error = fault_of(MACHINES[name], tmp_path)
    assert outcome_of(error, 0).how == "retry", error


@pytest.mark.parametrize("name", INPUTS)
def test_what_only_quotes_it(tmp_path: Path, name: str) -> None:
    error = fault_of(INPUTS[name], tmp_path)
    assert not is_machine_fault(error), error


WITHOUT_MEMORY = """
import resource
import datasets, numpy, pyarrow, torch
from spotune.sft.preflight import outcome_of

def told(make):
    try:
        make()
    except BaseException as error:
        return outcome_of(error, 0).how
    return "made"

rows = datasets.Dataset.from_dict({"a": [1, 2]})
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), -1))
print(
    told(lambda: numpy.zeros(1 << 40)),
    told(lambda: torch.zeros(1 << 40)),
    told(lambda: pyarrow.allocate_buffer(1 << 40)),
    told(lambda: rows.map(lambda row: {"b": "x" * (1 << 33)})),
)
"""


def test_missing_memory() -> None:
    found = subprocess.run([sys.executable, "-c", WITHOUT_MEMORY], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["retry"] * 4


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Nursery, Path]]:
    """Ranks whose cache of data sets is a file system of its own, and that."""
    home = tmp_path_factory.mktemp("cached")
    tiny.make_model(home / "model", layers=1)
    tiny.write_jsonl(home / "rows" / "train.jsonl", tiny.rows(400))
    with file_system(home / "datasets", "4m") as cache:
        ranks = Nursery(home)
        yield ranks, cache
        ranks.close()


@pytest.mark.slow
@pytest.mark.parametrize("keys", ["data", "dataset_name"])
@pytest.mark.parametrize("fault", ["full while it reads", "read-only while it reads", "full while it tokenizes"])
def test_a_run_whose_cache_fails(cached: tuple[Nursery, Path], tmp_path: Path, fault: str, keys: str) -> None:
    ranks, cache = cached
    rows = str(cache.parent / "rows")
    config: dict[str, Any] = {
        "model_name_or_path": str(cache.parent / "model"),
        **({"data": [{"source": rows}]} if keys == "data" else {"dataset_name": rows}),
        "max_steps": 1,
        "bf16": False,
        "report_to": "none",
        "max_length": 32,
    }

    def run(name: str, **changes: Any) -> Outcome:
        (found,) = ranks.run(make_folder(tmp_path / name, config | changes, cache=str(cache)))
        return Outcome(**found)

    for path in cache.iterdir():
        subprocess.run(["rm", "-rf", str(path)], check=True)
    if fault == "full while it tokenizes":
        assert run("before").how == "completed"
    if fault == "read-only while it reads":
        until(lambda: remounted(cache, "ro"))  # the rank before may not have closed its files yet
    else:
        fill(cache)
    outcome = run("during", max_length=31)
    assert remounted(cache, "rw")
    (cache / "ballast").unlink(missing_ok=True)
    assert outcome.how == "retry", outcome
    assert run("after", max_length=31).how == "completed"
