"""What a look returns: signs of work."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sign:
    """Somebody or something worked.

    Attributes:
        what: a few words for people, e.g. ``ssh session on pts/0``.
        at: when, epoch seconds; now for what still goes on.
    """

    what: str
    at: float
