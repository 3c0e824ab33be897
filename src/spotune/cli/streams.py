"""stdin, stdout and stderr as every verb may take them: there, and able to write any text."""

import io
import os
import sys


def open_streams() -> None:
    """A stream that was closed is /dev/null; what a terminal's encoding lacks is written as ``?``."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
        elif mode == "w" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def is_output(error: OSError) -> bool:
    """Whether it was raised where output is written; stdout or stderr have no name that an error could tell."""
    step = error.__traceback__
    while step and step.tb_next:
        step = step.tb_next
    return step is not None and step.tb_frame.f_globals["__name__"] in ("click.utils", "rich.console", "spotune.cli")


def let_go() -> None:
    """What stdout has not taken is not tried again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
