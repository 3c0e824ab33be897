"""What the watcher asks, and what it gets."""

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Protocol


class NoAnswer(Exception):
    """The service did not answer, or not as it should; ``str`` says how."""


@dataclass(frozen=True)
class Warned:
    """The machine goes, in ``grace_s`` seconds; None: the service does not say when."""

    grace_s: float | None


class Source(Protocol):
    """One service that knows whether this machine will be taken."""

    name: str  # for the log: whose notice it was
    every_s: float

    def look(self, now: float) -> Warned | None:
        """Asks once; ``now`` in epoch seconds. Raises NoAnswer when the service cannot be understood."""


def read_object(body: str) -> dict[str, Any]:
    """The JSON object in an answer; raises NoAnswer when it is none."""
    try:
        found = json.loads(body.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise NoAnswer(f"not JSON: {body[:80]!r}") from error
    if not isinstance(found, dict):
        raise NoAnswer(f"no JSON object: {body[:80]!r}")
    return found


def seconds_until(text: Any, now: float) -> float | None:
    """Seconds from ``now`` to a time as clouds write it (ISO 8601, or as in an HTTP header); None when it is none."""
    if not isinstance(text, str):
        return None
    for read in (datetime.fromisoformat, parsedate_to_datetime):
        try:
            time = read(text)
            break
        except ValueError:
            continue
    else:
        return None
    return max((time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp() - now, 0.0)
