"""``python3 -m spotune.keeper``: environment in, exit code out."""

import os
import sys
import time
from pathlib import Path

from spotune.keeper.keeper import keep
from spotune.keeper.look import look
from spotune.keeper.settings import Settings

if __name__ == "__main__":
    try:
        settings = Settings.read(dict(os.environ), Path.home())
    except ValueError as error:
        print(f"keeper: {error}", file=sys.stderr)
        sys.exit(2)  # nothing that another start would mend
    sys.exit(keep(settings, look(settings), time.time, time.sleep))
