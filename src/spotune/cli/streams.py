"""stdin, stdout and stderr as every verb may take them: there, and able to write any text.

What is asked for goes to stdout, and a verb that cannot write it fails. What goes to stderr never decides a result.
"""

import io
import os
import sys

from spotune.contracts.output import protect_output


def open_streams() -> None:
    """A stream that was closed is /dev/null; what the encoding of stdout lacks is written as ``?``, in its width."""
    protect_output(("stderr",))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def is_output(error: OSError) -> bool:
    """Whether it was raised where output is written; stdout or stderr have no name that an error could tell."""
    step = error.__traceback__
    while step and step.tb_next:
        step = step.tb_next
    return step is not None and step.tb_frame.f_globals["__name__"] in ("click.utils", "rich.console", "spotune.cli")


def let_go() -> None:
    """What stdout has not taken is not tried again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
