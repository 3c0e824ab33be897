"""stdout and stderr that cannot be written, or not everything: the process does not notice."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

import spotune
from spotune.core.errors import Unfailing, protected

# Prints on both streams by every road that libraries take, forks a child that does too, and leaves its own exit code.
PROGRAM = """
import logging, os, sys
from pathlib import Path
from spotune.core.errors import protect_output

protect_output()
opened = open(sys.argv[1], "w")
logging.basicConfig(stream=sys.stderr)
for number in range(3):
    print("✅ one", "\\udc80", flush=number == 1)
    print("é two", file=sys.stderr)
    logging.error("✅ three")
    sys.stdout.write("x" * 100_000 + "\\n")
sys.stdout.buffer.write("✅".encode())
sys.stdout.flush()
if os.fork() == 0:
    print("child")
    sys.exit(0)
os.wait()
os.system("echo from a shell; echo from a shell >&2")
opened.write(f"{opened.fileno() > 2} {sys.stdout.fileno()} {sys.stdout.isatty()}")
opened.close()
sys.exit(7)
"""
STREAMS = {
    "full": "> /dev/full 2> /dev/full",
    "one full": "2> /dev/full",
    "closed": ">&- 2>&-",
    "all closed": "<&- >&- 2>&-",
    "stdout closed": ">&-",
    "no reader": "2>&1 | true",
}
ENVIRONS = {
    "plain": {},
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "latin-1": {"PYTHONIOENCODING": "latin-1:strict"},
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "unbuffered": {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "ascii"},
}


def run(tmp_path: Path, redirected: str, **environ: str) -> "subprocess.CompletedProcess[bytes]":
    program = tmp_path / "program.py"
    program.write_text(PROGRAM, encoding="utf-8", errors="surrogatepass")
    line = f"set -o pipefail; {sys.executable} {program} {tmp_path}/left {redirected}"
    env = {**os.environ, "PYTHONPATH": str(Path(spotune.__file__).parents[1]), **environ}
    return subprocess.run(["bash", "-c", line], env=env, capture_output=True, check=False)


@pytest.mark.parametrize("streams", STREAMS)
def test_a_process_ends_as_it_would_have(tmp_path: Path, streams: str) -> None:
    done = run(tmp_path, STREAMS[streams])
    assert done.returncode == 7
    assert (tmp_path / "left").read_text() == "True 1 False"
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("environ", ENVIRONS)
def test_every_locale_has_room_for_everything(tmp_path: Path, environ: str) -> None:
    done = run(tmp_path, "", **ENVIRONS[environ])
    assert done.returncode == 7, done.stderr.decode()
    mark = "✅".encode() if environ == "plain" else b"\\u2705"
    assert done.stdout.count(mark + b" one \\udc80\n") == 3
    assert done.stderr.count(b"ERROR:root:" + mark + b" three\n") == 3
    assert done.stdout.endswith(b"child\nfrom a shell\n")
    assert (b"\xe9 two\n" in done.stderr) == (environ == "latin-1")


@pytest.mark.parametrize("can_block", [True, False])
def test_a_pipe_that_nobody_empties_holds_nobody_up(monkeypatch: pytest.MonkeyPatch, can_block: bool) -> None:
    monkeypatch.setattr("spotune.core.io.PATIENCE_S", 0.01)
    reader, writer = os.pipe()
    os.set_blocking(writer, can_block)
    with Unfailing(writer, "w") as file:
        sent = bytes(1 << 20)  # more than a pipe holds
        assert file.write(sent) == len(sent)
        assert file.write(b"lost") == 4
        os.set_blocking(reader, False)
        while _read(reader):
            pass
        assert file.write(b"arrives") == 7
        assert _read(reader) == b"arrives"
    os.close(reader)


def _read(reader: int) -> bytes:
    try:
        return os.read(reader, 1 << 16)
    except BlockingIOError:
        return b""


def test_a_stream_that_is_no_file_stays() -> None:
    assert protected(held := io.StringIO()) is held
    captured = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    assert protected(captured) is captured
    print("✅", file=captured, flush=True)
    assert captured.buffer.getvalue() == b"\\u2705\n"  # type: ignore[attr-defined]


def test_every_process_begins_with_it() -> None:
    """A module that is started by itself protects its output, or leaves that to the `main` that it calls."""
    source = Path(spotune.__file__).parent
    entries = {path for path in source.rglob("*.py") if 'if __name__ == "__main__"' in path.read_text()}
    names = {path.relative_to(source).as_posix() for path in entries if "protect_output()" not in path.read_text()}
    # The guard's own `main` does it; the watcher stands alone; the schema is written by contributors, on a terminal.
    assert names == {"sft/__main__.py", "idle.py", "sft/arguments.py"}
    assert "protect_output()" in (source / "guard" / "main.py").read_text()
    assert "open_log()" in (source / "idle.py").read_text()
