"""``python -m spotune.sft CONFIG [--profile P] [--set key=value]... [TRL's own flags]``."""

import sys

from spotune.guard.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
