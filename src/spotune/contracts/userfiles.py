"""Reads a small text file that a user names, or that lies in a folder of a mate's: a config, a plan, an adapter's base.

Never waits, and never reads without end.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any

from spotune.contracts.errors import InputError
from spotune.contracts.machinefaults import is_machine_fault

MOST_BYTES = 16 << 20
_KINDS = {stat.S_IFIFO: "a FIFO", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFDIR: "a folder"}


def read_user_file(path: str | Path) -> str:
    """Returns the text of a file.

    Raises:
        InputError: it is missing, is not a plain file, has more than 16 MiB or is not UTF-8.
        OSError: the machine's disk failed.
    """
    try:
        # A FIFO without a writer would let a plain open wait for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
            if kind != stat.S_IFREG:
                raise InputError(path, f"is {_KINDS.get(kind, 'not a file')}", remedy="name a plain file")
            with open(descriptor, "rb", closefd=False) as file:
                data: bytes | None = file.read(MOST_BYTES + 1)
        finally:
            os.close(descriptor)
    except FileNotFoundError as error:
        raise InputError(path, "no such file") from error
    except (OSError, ValueError) as error:  # the latter: a NUL in the name
        if is_machine_fault(error):
            if isinstance(error, OSError):
                error.filename = error.filename or str(path)  # a read does not name its file
            raise
        raise InputError(path, f"cannot be read: {error}") from error
    if data is None:  # a file of the kernel's without anything to say just now
        raise InputError(path, "cannot be read: it would have to be waited for", remedy="name a plain file")
    if len(data) > MOST_BYTES:
        raise InputError(path, f"has more than {MOST_BYTES >> 20} MiB", remedy="is it the right file?")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InputError(path, f"cannot be read: {error}", remedy="save the file as UTF-8") from error


def read_user_json(path: str | Path) -> Any:
    """Returns what a JSON file holds. Raises as ``read_user_file``, and InputError for what is not JSON."""
    try:
        return json.loads(read_user_file(path).removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:  # the latter: brackets without end
        raise InputError(path, f"cannot be read: not JSON: {error}") from error
