"""SkyPilot's own code, imported once for all the tests that ask it something: that takes seconds.

A question is a script. It runs in a fork of the process that has imported SkyPilot, so that nothing of one question is
left for the next. SkyPilot keeps paths below HOME when it is imported: HOME is a link, set to each question's folder.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SERVER = """
import json, os, sys, tempfile, traceback
import sky
from sky import optimizer, skypilot_config
import alembic.command, boto3, networkx, pandas  # which SkyPilot imports when it first needs them

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
for line in sys.stdin:
    asked = json.loads(line)
    pid = os.fork()
    if not pid:
        code = 1
        try:
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(asked[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            os.chdir(asked["cwd"])
            os.environ.clear()
            os.environ.update(asked["environ"])
            sys.argv = ["-c", *asked["argv"]]
            sys.path.insert(0, "")
            skypilot_config.reload_config()
            exec(compile(asked["script"], "<question>", "exec"), {"__name__": "__main__"})
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    print(os.waitstatus_to_exitcode(status), file=answers, flush=True)
os._exit(0)
"""


class RealSky:
    """Asks SkyPilot; see the module."""

    def __init__(self, server: "subprocess.Popen[str]", home: Path) -> None:
        self._server, self._home = server, home

    def lines(
        self,
        home: Path,
        script: str,
        arguments: Sequence[str] = (),
        environ: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> list[str]:
        """What the script prints in a process whose HOME is ``home``."""
        assert self._server.stdin
        assert self._server.stdout
        self._home.unlink(missing_ok=True)
        self._home.symlink_to(home.resolve())
        given = {**os.environ, **(environ or {}), "HOME": str(self._home), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            question = {"script": script, "argv": list(arguments), "environ": given, "cwd": str(cwd or home)}
            print(json.dumps({**question, "out": str(out), "err": str(err)}), file=self._server.stdin, flush=True)
            code = self._server.stdout.readline()
            assert code == "0\n", f"{code}{err.read_text()[-3000:] if err.exists() else ''}"
            return out.read_text().splitlines()

    def json(self, home: Path, script: str, *arguments: str, cwd: Path | None = None) -> Any:
        """What the script prints last, read as JSON."""
        return json.loads(self.lines(home, script, arguments, cwd=cwd)[-1])


@contextmanager
def real_sky(folder: Path) -> Iterator[RealSky]:
    """A process that has imported SkyPilot; its link to a HOME is in ``folder``."""
    home, first = folder / "home", folder / "first"
    first.mkdir()
    home.symlink_to(first)
    environ = {**os.environ, "HOME": str(home), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    streams: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", SERVER], env=environ, **streams) as server:
        yield RealSky(server, home)
        assert server.stdin
        server.stdin.close()
