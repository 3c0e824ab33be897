"""One line for people, which never gets in the way: after a SIGTERM stdout may be gone."""

import sys


def say(text: str) -> None:
    try:
        print(f"[spotune] {text}", file=sys.stderr, flush=True)
    except (OSError, ValueError):  # broken pipe, closed file
        return
