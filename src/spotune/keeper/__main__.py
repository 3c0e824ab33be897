"""``python3 -m spotune.keeper``: environment in, exit code out."""

import os
import sys
import time
from pathlib import Path

from spotune.keeper.watcher import Settings, close_log, keep, log, look, open_log


def main() -> int:
    try:
        settings = Settings.read(dict(os.environ), Path.home())
    except ValueError as error:
        log(str(error), to_stderr=True)
        return 2  # nothing that another start would mend
    return keep(settings, look(settings), time.time, time.sleep)


if __name__ == "__main__":
    open_log()
    code = main()
    close_log()
    sys.exit(code)
