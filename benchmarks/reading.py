"""What reading ``data:`` costs: rows a second and memory, from files to the data set that TRL tokenizes.

    .venv-train/bin/python benchmarks/reading.py [--rows 200000] [--rounds 3] [--src FOLDER]

Each figure comes from a process of its own with an empty cache, the libraries imported before the clock starts.
``--src`` names the ``src`` folder of another checkout, to compare two versions on the same files. "Again" is a second
process that finds the first one's cache. Memory is what the reader adds to its process's anonymous memory at the peak:
what it holds itself, without pages of files that the kernel can drop.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

KINDS = ("messages.jsonl", "prompts.jsonl", "prompts.csv", "messages.parquet", "prompts.parquet")


def make_files(folder: Path, rows: int) -> None:
    """Writes the same conversations as JSON lines, CSV and Parquet: about 420 bytes of text a row."""
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet as pq

    prompts = [
        f"Question {number}: what is {number} times 7, and how is it found? " + "word " * 40 for number in range(rows)
    ]
    answers = [f'It is {number * 7}.\nSeven times {number}, "step by step". ' + "more " * 25 for number in range(rows)]
    talks = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    pairs = pa.table({"prompt": prompts, "completion": answers})
    (folder / "messages.jsonl").write_text(
        "".join(json.dumps({"id": i, "messages": talk}) + "\n" for i, talk in enumerate(talks))
    )
    with open(folder / "prompts.jsonl", "w") as file:
        file.writelines(
            json.dumps({"prompt": prompt, "completion": answer}) + "\n"
            for prompt, answer in zip(prompts, answers, strict=True)
        )
    pa.csv.write_csv(pairs, folder / "prompts.csv")
    pq.write_table(pairs, folder / "prompts.parquet")
    pq.write_table(pa.table({"messages": talks}), folder / "messages.parquet")


def read_once(source: str, cache: str) -> dict[str, float]:
    """Reads one source in this process: ``{seconds, cpu_s, mb, rows}``."""
    import datasets

    from spotune.core.protocol import WorkerJob
    from spotune.sft.data import load_data

    datasets.disable_progress_bars()
    datasets.config.HF_DATASETS_CACHE = cache
    training = SimpleNamespace(eval_strategy="no", seed=1, data_seed=None, dataset_text_field="text")
    job = WorkerJob("reading", 1, {"data": [{"source": source}]}, "reading.yaml", cache)
    before, peak, done = _anonymous_mb(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], _anonymous_mb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began, cpu = time.perf_counter(), time.process_time()
    data = load_data(SimpleNamespace(training=training), job)  # type: ignore[arg-type]
    seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu
    done.set()
    watcher.join()
    return {"seconds": seconds, "cpu_s": cpu_s, "mb": max(0.0, peak[0] - before), "rows": len(data.train)}


def _anonymous_mb() -> float:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024


def measure(source: Path, src: str, rounds: int) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """(first reads, reads again) of a source, each in a new process."""
    first, again = [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            command = [sys.executable, __file__, "--one", str(source), cache]
            environ = {**os.environ, "PYTHONPATH": src, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": cache}
            for found in (first, again):
                out = subprocess.run(command, env=environ, check=True, capture_output=True, text=True).stdout
                found.append(json.loads(out.splitlines()[-1]))
    return first, again


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--src", default=str(Path(__file__).resolve().parent.parent / "src"))
    parser.add_argument("--files", default="", help="a folder to keep the files in, for another run")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(read_once(*options.one)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(options.files or scratch)
        folder.mkdir(exist_ok=True)
        if not (folder / KINDS[-1]).exists():
            make_files(folder, options.rows)
        print("| file | MB | rows/s, median | worst | CPU s | again, s | peak memory |\n|---|---|---|---|---|---|---|")
        for kind in KINDS:
            first, again = measure(folder / kind, options.src, options.rounds)
            speeds = sorted(run["rows"] / run["seconds"] for run in first)
            print(
                f"| {kind} | {(folder / kind).stat().st_size / 1e6:.0f} | {statistics.median(speeds):,.0f}"
                f" | {speeds[0]:,.0f} | {statistics.median(_each(first, 'cpu_s')):.1f}"
                f" | {statistics.median(_each(again, 'seconds')):.2f} | {max(_each(first, 'mb')):.0f} MB |",
                flush=True,
            )


def _each(runs: list[dict[str, float]], name: str) -> list[Any]:
    return [run[name] for run in runs]


if __name__ == "__main__":
    main()
