"""Checks before anything expensive."""

from collections.abc import Mapping
from typing import Any


def check(config: Mapping[str, Any], where: str) -> None:
    """Raises InputError for what cannot work on this machine."""
