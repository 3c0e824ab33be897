"""Requests of each verb: to the bucket, by method and key, and to the engine.

Real verbs, in processes of their own, on a real S3 server (moto) behind a proxy that counts. Each verb has a proxy of
its own: what machines and the supervisor ask is not in its count. Look-ups of the local queue are the times that the
verb's process opens ``queue.db``. For SkyPilot a stand-in for the module ``sky`` comes first on the verb's path: it
answers from a file and writes down each call. What a verb asks again and again from one place, while it waits, counts
once. Nothing of spotune is patched: only the command line, environment variables and files are used, so that the same
script runs on any version.

    .venv/bin/python benchmarks/lookups.py [--src DIR] [--keys] [--where]
"""

import argparse
import http.client
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from drill import servers

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 120.0
METHODS = ("GET", "HEAD", "LIST", "PUT", "DELETE")
SKY = "kubernetes/lab"


@dataclass
class Count:
    """What one verb asked."""

    bucket: Counter[tuple[str, str]] = field(default_factory=Counter)  # method, key
    engine: Counter[str] = field(default_factory=Counter)
    where: Counter[str] = field(default_factory=Counter)
    waiting: int = 0  # further calls from the same place, one after the other

    def of(self, method: str) -> int:
        return sum(number for (one, _), number in self.bucket.items() if one == method)

    def again(self) -> list[str]:
        """Keys that were read, listed or looked for more than once, in whatever way."""
        reads: Counter[str] = Counter()
        for (method, key), number in self.bucket.items():
            if method in ("GET", "HEAD", "LIST"):
                reads[key] += number
        return [f"{key} {number}" for key, number in sorted(reads.items()) if number > 1]


# The bucket: a proxy that counts.


@contextmanager
def counting(target: str, count: Count, prefix: str) -> Iterator[str]:
    """Yields the URL of a proxy in front of an S3 server; ``prefix`` is left out of the keys."""
    host = urlsplit(target).netloc

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass_on(self) -> None:
            count.bucket[request_of(self.command, self.path, prefix)] += 1
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length) if length else None
            client = http.client.HTTPConnection(host, timeout=LIMIT_S)
            client.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("connection", "expect"):
                    client.putheader(name, value)
            client.endheaders(body)
            answer = client.getresponse()
            data = answer.read()
            self.send_response_only(answer.status, answer.reason)
            for name, value in answer.getheaders():
                if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                    self.send_header(name, value)
            size = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
            self.send_header("Content-Length", size or "0")
            self.end_headers()
            self.wfile.write(data)
            client.close()

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on

        def log_message(self, *_: Any) -> None:
            """Nothing is printed."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def request_of(command: str, path: str, prefix: str) -> tuple[str, str]:
    """A request as the table has it: LIST for a listing, and the key below the prefix."""
    parts = urlsplit(path)
    key, query = unquote(parts.path).strip("/"), parse_qs(parts.query)
    if command == "GET" and "/" not in key:
        return "LIST", query.get("prefix", [""])[0].removeprefix(prefix) or "/"
    key = key.partition("/")[2].removeprefix(prefix)
    return ("DELETE" if command == "POST" and "delete" in parts.query else command), key


# The engine: files that the verb's process writes.

HOOK = """
import os, sys
_file = os.environ.pop("COUNT_FILE", "")  # what the verb starts is not counted
if _file:
    def _where():
        frame, found = sys._getframe(2), []
        while frame:
            name = frame.f_code.co_filename
            if "/spotune/" in name:
                found.append(f"{name.rpartition('/spotune/')[2]}:{frame.f_code.co_name}:{frame.f_lineno}")
            frame = frame.f_back
        return " < ".join(found[:9])
    def _hook(event, arguments):
        if event == "sqlite3.connect" and str(arguments[0]).endswith("queue.db"):
            with open(_file, "a") as file:
                file.write("queue.db\\t" + _where() + "\\n")
    sys.addaudithook(_hook)
    import builtins
    builtins._count = lambda what: open(_file, "a").write(what + "\\t" + _where() + "\\n")
else:
    import builtins
    builtins._count = lambda what: None
"""
SKY_MODULES = {
    "sky/__init__.py": """
import builtins, json, os
from types import SimpleNamespace
from sky import jobs
class Task:
    name = None
    @classmethod
    def from_yaml_config(cls, config):
        return cls()
    def __getattr__(self, name):
        return lambda *arguments, **options: self
class Dag:
    def __enter__(self):
        return self
    def __exit__(self, *error):
        return False
    def add(self, task):
        pass
def get(request):
    return request
def stream_and_get(request, output_stream=None):
    return request
def optimize(dag):
    builtins._count("optimize")
def api_status():
    builtins._count("api_status")
    return []
""",
    "sky/jobs.py": """
import builtins, json, os, time
from types import SimpleNamespace
def _state():
    with open(os.environ["SKY_STATE"]) as file:
        return json.load(file)
def _keep(state):
    with open(os.environ["SKY_STATE"], "w") as file:
        json.dump(state, file)
def queue_v2(refresh=False, all_users=False, fields=None, name_match=None, job_ids=None):
    builtins._count("jobs.queue" + (" of the run" if name_match else " of the job" if job_ids else " of all"))
    rows = _state()
    if name_match:
        rows = [row for row in rows if name_match in row["job_name"]]
    if job_ids:
        rows = [row for row in rows if row["job_id"] in job_ids]
    return ([SimpleNamespace(**row) for row in rows],)
def cancel(job_ids=None, **options):
    builtins._count("jobs.cancel")
    rows = _state()
    for row in rows:
        if row["job_id"] in job_ids:
            row |= {"status": "CANCELLED", "end_at": time.time()}
    _keep(rows)
def launch(task, name=None, **options):
    builtins._count("jobs.launch")
    rows = _state()
    row = next(row for row in rows if row["job_name"] == name)
    rows.append({**row, "job_id": 90, "status": "PENDING", "start_at": None, "end_at": None})
    _keep(rows)
    return [90], None
def tail_logs(**options):
    builtins._count("jobs.tail_logs")
    return iter(["a line\\n", None])
""",
    "sky/server/__init__.py": "",
    "sky/server/common.py": """
import builtins
from types import SimpleNamespace
def get_api_server_status():
    builtins._count("api status")
    return SimpleNamespace(status=SimpleNamespace(value="healthy"))
def make_authenticated_request(method, path, json=None):
    builtins._count(path)
    return json
def get_request_id(answer):
    return []
def is_api_server_local(url=None):
    return False
""",
    "sky/server/requests/__init__.py": "",
    "sky/server/requests/payloads.py": """
class _Body:
    def __init__(self, **fields):
        self.fields = fields
    def model_dump_json(self):
        import json
        return json.dumps(self.fields)
GetJobEventsBody = CostReportBody = _Body
""",
    "sky/data/__init__.py": "",
    "sky/data/storage_utils.py": "def get_excluded_files(folder):\n    return []\n",
}


class Bench:
    """A project, its runs in a bucket, and verbs that are counted."""

    def __init__(self, folder: Path, endpoint: str, source: Path) -> None:
        self.folder, self._endpoint, self._source = folder, endpoint, source
        self.home, self.sky_home, self.told = folder / "home", folder / "sky-home", folder / "told"
        self.prefix, self.bucket = "bench/", f"s3://{servers.BUCKET}/bench"
        self.path = folder / "path"
        self._write_project()

    def _write_project(self) -> None:
        (self.folder / "model").mkdir()
        (self.folder / "model/config.json").write_text("{}")
        (self.folder / "model/model.safetensors").write_bytes(b"base")
        (self.folder / "data.jsonl").write_text("".join(f'{{"text": "row {number}"}}\n' for number in range(50)))
        config = {"model_name_or_path": "model", "data": [{"source": "data.jsonl"}], "max_steps": 12, "save_steps": 3}
        (self.folder / "run.yaml").write_text(json.dumps({**config, "learning_rate": 1e-3, "logging_steps": 2}))
        (self.folder / "tasks").mkdir()
        self.told.mkdir()
        for name, text in {"sitecustomize.py": HOOK}.items():
            self._file(self.path / name, text)
        for name, text in SKY_MODULES.items():
            self._file(self.folder / "stand-in" / name, text)
        kubectl = self._file(self.folder / "bin/kubectl", "#!/bin/sh\necho 'pod \"machine\" deleted'\n")
        kubectl.chmod(0o755)
        environ = {
            "SPOTUNE_PYTHON": sys.executable,
            "SPOTUNE_WORKER": shlex.quote(str(ROOT / "tests/fake_worker.py")),
            "FAKE_WORKER_DIR": str(self.told),
        }
        run = 'exec "$SPOTUNE_PYTHON" -m spotune.sft "$SPOTUNE_CONFIG"'
        (self.folder / "tasks/train.yaml").write_text(
            json.dumps({"run": run, "envs": environ, "resources": {"use_spot": True}})
        )
        for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "The project"]):
            who = ("-c", "user.name=Ada", "-c", "user.email=ada@example.org")
            subprocess.run(["git", *who, *words], cwd=self.folder, check=True)

    def _file(self, path: Path, text: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def environ(self, endpoint: str, home: Path) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SPOTUNE_", "SKYPILOT_"))}
        stand_in = [str(self.folder / "stand-in")] if home == self.sky_home else []
        return {
            **kept,
            **servers.s3_environment(endpoint),
            "PYTHONPATH": os.pathsep.join([str(self.path), *stand_in, str(self._source), str(ROOT)]),
            "PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "SPOTUNE_HOME": str(home),
            "SPOTUNE_BUCKET": self.bucket,
            "SPOTUNE_USER": "ada",
            "SKY_STATE": str(self.folder / "sky.json"),
            "HF_HUB_OFFLINE": "1",
        }

    def verb(self, *words: str, codes: Sequence[int] = (0,), environ: dict[str, str] | None = None) -> str:
        """A verb that is not counted, or with this environment; returns what it printed."""
        command = [str(Path(sys.executable).with_name("spotune")), *words]
        given = environ or self.environ(self._endpoint, self.home)
        done = subprocess.run(command, cwd=self.folder, env=given, capture_output=True, text=True, timeout=LIMIT_S)
        if done.returncode not in codes:
            sys.exit(
                f"spotune {' '.join(words)} ended with {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
            )
        return done.stdout

    def counted(self, *words: str, home: Path | None = None) -> Count:
        count, file = Count(), self.folder / "count"
        file.write_text("")
        with counting(self._endpoint, count, self.prefix) as proxy:
            self.verb(*words, environ={**self.environ(proxy, home or self.home), "COUNT_FILE": str(file)})
        before = ""
        for line in file.read_text().splitlines():
            if line == before:
                count.waiting += 1
                continue
            before, (what, _, where) = line, line.partition("\t")
            count.engine[what] += 1
            count.where[f"{what}: {where}"] += 1
        return count

    def row(self, run_id: str) -> dict[str, Any]:
        rows = json.loads(self.verb("queue", "--format", "json"))
        found: dict[str, Any] = next(row for row in rows if row["run_id"] == run_id)
        return found

    def until(self, seen: Callable[[], Any]) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not seen():
            if time.monotonic() > deadline:
                sys.exit(f"nothing has come within {LIMIT_S:.0f} s: {self.verb('queue')}")
            time.sleep(0.3)

    # The runs.

    def make_runs(self) -> None:
        """``done`` (two machines), ``failed``, and ``held``, which is under way and holds the machine."""
        plan = self._file(self.folder / "preemptions.jsonl", '{"at_step": 4, "notice_s": 30}\n')
        (self.told / "steps").write_text("5")
        self.verb("train", "run.yaml", "--name", "done", "-y", "-d", "--preemptions", str(plan))
        self.until(lambda: self.row("done")["recoveries"] or (self.row("done")["step"] or 0) >= 5)
        (self.told / "steps").unlink()
        self.until(lambda: self.row("done")["state"] == "SUCCEEDED")
        (self.told / "fault").write_text('{"step": 5, "how": "failed"}')
        self.verb("train", "run.yaml", "--name", "failed", "-y", codes=(1,))
        (self.told / "steps").write_text("4")
        self.verb("train", "run.yaml", "--name", "held", "-y", "-d")
        self.until(lambda: (self.row("held")["step"] or 0) >= 4)

    def hand_to_sky(self, prefix: str) -> None:
        """The same runs, as if SkyPilot had them: its jobs, and what a home keeps of a run that it has submitted.

        From now on they are those of a copy of the bucket.
        """
        self._copy_bucket(prefix)
        now = time.time()
        jobs = []
        for number, (run_id, status) in enumerate({"done": "SUCCEEDED", "failed": "FAILED", "held": "RUNNING"}.items()):
            task = {"name": run_id, "run": "true", "envs": {"SPOTUNE_BUCKET": self.bucket}, "resources": {"infra": SKY}}
            entry = {
                "run_id": run_id, "infra": SKY, "bucket": self.bucket, "user": "ada", "priority": 0,
                "submitted_at": now - 600, "workdir": str(self.folder), "task": task, "jobs": [number + 1],
            }  # fmt: skip
            self._file(self.sky_home / f"skypilot/runs/{run_id}.json", json.dumps(entry))
            row = dict.fromkeys("task_id schedule_state failure_reason details zone priority user_name".split())
            times = {"submitted_at": now - 600, "start_at": now - 590, "end_at": None if status == "RUNNING" else now}
            jobs.append({
                **row, **times, "job_id": number + 1, "job_name": run_id, "status": status, "recovery_count": 0,
                "cloud": "Kubernetes", "region": "lab", "metadata": {"spotune": {"bucket": self.bucket, "user": "ada"}},
                "current_cluster_name": f"{run_id}-{number + 1}", "cluster_name_on_cloud": f"{run_id}-{number + 1}-0",
            })  # fmt: skip
        self._file(self.folder / "sky.json", json.dumps(jobs))

    def _copy_bucket(self, prefix: str) -> None:
        from botocore.session import get_session

        keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
        client = get_session().create_client("s3", endpoint_url=self._endpoint, **keys)
        names = {"Bucket": servers.BUCKET, "Prefix": "bench/"}
        for page in client.get_paginator("list_objects_v2").paginate(**names):
            for entry in page.get("Contents", []):
                source = {"Bucket": servers.BUCKET, "Key": entry["Key"]}
                key = f"{prefix}/{entry['Key'].removeprefix('bench/')}"
                client.copy_object(Bucket=servers.BUCKET, Key=key, CopySource=source)
        client.close()
        self.prefix, self.bucket = f"{prefix}/", f"s3://{servers.BUCKET}/{prefix}"

    def end(self) -> None:
        """No process of the runs stays: their machines, and the supervisor, which leaves when all is still."""
        (self.told / "steps").unlink(missing_ok=True)
        for run_id in ("new", "failed", "held"):
            self.verb("cancel", run_id, "-y", codes=(0, 1, 2))


def local_verbs(bench: Bench) -> dict[str, Count]:
    """In an order in which each finds what it needs; ``held`` holds the machine, so that nothing else starts."""
    verbs = {
        "queue": ("queue",),
        "queue -a": ("queue", "-a"),
        "logs RUN": ("logs", "done"),
        "cost RUN": ("cost", "done"),
        "cost RUN, again": ("cost", "done"),
        "train": ("train", "run.yaml", "--name", "new", "-y", "-d"),
        "resume RUN": ("resume", "failed", "-y"),
        "resume RUN --set": ("resume", "failed", "-y", "--set", "max_steps=14"),
        "preempt RUN": ("preempt", "held", "--notice", "60s"),
        "cancel RUN": ("cancel", "held", "-y"),
    }
    counts = {}
    for name, words in verbs.items():
        if name == "resume RUN --set":
            bench.verb("cancel", "failed", "-y")
        if name == "preempt RUN":  # what waits would start while this one leaves
            bench.verb("cancel", "failed", "-y")
            bench.verb("cancel", "new", "-y")
        counts[f"`{name}`"] = bench.counted(*words)
    return counts


def sky_verbs(bench: Bench) -> dict[str, Count]:
    verbs = {
        "queue": ("queue",),
        "queue -a": ("queue", "-a"),
        "logs RUN": ("logs", "done"),
        "cost RUN": ("cost", "done"),
        "cost RUN, under way": ("cost", "held"),
        "resume RUN": ("resume", "failed", "-y"),
        "preempt RUN": ("preempt", "held", "--no-notice"),
        "cancel RUN": ("cancel", "held", "-y"),
    }
    counts, own = {}, (bench.prefix, bench.bucket)
    for number, (name, words) in enumerate(verbs.items()):
        bench.hand_to_sky(f"sky-{number}")  # each verb finds the same
        counts[f"`{name}`"] = bench.counted(*words, home=bench.sky_home)
        bench.prefix, bench.bucket = own
    return counts


def print_table(title: str, counts: dict[str, Count], what: str) -> None:
    print(f"\n{title}\n\n| verb | {' | '.join(METHODS)} | all | {what} | read more than once |")
    print(f"|{'---|' * (len(METHODS) + 4)}")
    for name, count in counts.items():
        figures = [count.of(method) for method in METHODS]
        engine = "; ".join(f"{one} {number}" for one, number in sorted(count.engine.items()))
        engine = str(count.engine["queue.db"]) if count.engine.keys() <= {"queue.db"} else engine
        engine += f", {count.waiting} more while it waits" if count.waiting else ""
        cells = [name, *map(str, figures), str(sum(count.bucket.values())), engine, ", ".join(count.again()) or "–"]
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--src", type=Path, default=ROOT / "src", help="the sources to count, of another checkout, say")
    parser.add_argument("--keys", action="store_true", help="every request, by method and key")
    parser.add_argument("--where", action="store_true", help="the functions that asked the engine")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="requests-") as folder, servers.s3_server() as endpoint:
        bench = Bench(Path(folder).resolve(), endpoint, asked.src.resolve())
        try:
            bench.make_runs()
            sky = sky_verbs(bench)
            local = local_verbs(bench)
        finally:
            bench.end()
    print_table("`--infra local`", local, "look-ups in queue.db")
    print_table("SkyPilot", sky, "calls of `sky`")
    for title, counts in (("local", local), ("SkyPilot", sky)):
        for name, count in counts.items():
            details = [f"{method} {key} {number}" for (method, key), number in sorted(count.bucket.items())]
            details = (details if asked.keys else []) + (
                [f"{number} × {where}" for where, number in count.where.most_common()] if asked.where else []
            )
            if details:
                print(f"\n{title} {re.sub('`', '', name)}\n  " + "\n  ".join(details))


if __name__ == "__main__":
    main()
