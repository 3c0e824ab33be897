"""One extra: ``python -m spotune.sft.extras NAME FOLDER``, started by the guard (see core/protocol.py).

Deaf to signals like a rank, and dead when the guard is. It always leaves an answer.
"""

from spotune.sft.worker import die_with_parent, ignore_signals

if __name__ == "__main__":
    ignore_signals()  # before anything else is imported

import os
import sys
from pathlib import Path

from spotune.core.errors import SpotuneError
from spotune.core.output import protect_output
from spotune.core.protocol import EXTRAS, MERGE, MERGED, OUTPUT, Answer, ExtraJob, answer_path, read_json, write_json
from spotune.sft.preflight import one_line, print_traceback


def main(argv: list[str]) -> None:
    """Does the extra and ends the process; never returns."""
    protect_output()
    die_with_parent(os.environ)
    name, folder = argv[1], Path(argv[2]).absolute()
    answer = run(name, folder)
    write_json(answer_path(folder, name), answer)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if answer.done else 1)


def run(name: str, folder: Path) -> Answer:
    """Does the extra and says how it ended."""
    try:
        job = ExtraJob(**read_json(folder / EXTRAS))
        return Answer(True, facts=_do(name, job, folder))
    except SpotuneError as error:
        return Answer(False, str(error))
    except BaseException as error:  # the process's edge: whatever it is, the guard must hear of it
        print_traceback(error)
        return Answer(False, one_line(error))


def _do(name: str, job: ExtraJob, folder: Path) -> dict[str, str]:
    if name == MERGE:
        from spotune.sft.merge import merge

        return merge(job.config, folder / OUTPUT, folder / MERGED)
    from spotune.sft.merge import hub, push

    return push(job, folder / OUTPUT, hub())


if __name__ == "__main__":
    main(sys.argv)
