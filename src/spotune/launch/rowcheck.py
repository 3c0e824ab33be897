"""Looks at the rows of a config's local data files, by the trainer's Python: the launcher's reads no Parquet."""

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spotune.contracts.errors import InputError, SpotuneError
from spotune.launch.trainer import find_trainer

MOST_BYTES = 16 << 20  # keeps ``check`` within a second
_ASKED = "spotune.sft.rowcheck"


class RowsRefused(InputError):
    """A row does not fit; the message is the trainer's own."""

    def __init__(self, message: str) -> None:
        SpotuneError.__init__(self, message)


def check_rows(
    config: Mapping[str, Any], path: str, environ: Mapping[str, str], folder: Path, most_bytes: int = MOST_BYTES
) -> dict[str, Any]:
    """Returns ``{rows_read: number, rows_not_read: [file or reason, …]}``.

    Args:
        config: a resolved one.
        path: its file, for messages.
        environ: of the shell.
        folder: the project's.
        most_bytes: about how much is read.

    Raises:
        InputError: a row, or all of a source's rows together, do not fit.
    """
    if not config.get("data"):
        return {"rows_read": 0, "rows_not_read": ["only rows of data: are read here"]}
    try:
        python = find_trainer(environ, folder)
    except InputError as error:
        return {"rows_read": 0, "rows_not_read": [str(error)]}
    asked = json.dumps({"config": config, "config_path": path, "most_bytes": most_bytes}, default=str)
    source = str(Path(__file__).resolve().parents[2])
    child = {**environ, "PYTHONPATH": os.pathsep.join([source, *filter(None, [environ.get("PYTHONPATH", "")])])}
    ended = subprocess.run(
        [python, "-m", _ASKED], input=asked, env=child, cwd=folder, capture_output=True, text=True, check=False
    )
    try:
        found = json.loads(ended.stdout)
    except ValueError:
        last = (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1]
        return {"rows_read": 0, "rows_not_read": [f"{python} cannot read them: {last}"]}
    if found["error"]:
        raise RowsRefused(found["error"])
    return {"rows_read": found["rows"], "rows_not_read": found["partly"]}
