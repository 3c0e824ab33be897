"""One line for people, which never gets in the way: after a SIGTERM stdout may be gone."""

import sys


def say(text: str, bare: bool = False) -> None:
    """Prints to stderr; ``bare`` for an error, whose line begins with where it is."""
    try:
        print(text if bare else f"[spotune] {text}", file=sys.stderr, flush=True)
    except (OSError, ValueError):  # broken pipe, closed file
        return
