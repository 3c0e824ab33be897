"""What YAML can say and JSON cannot: a value inside itself or in thousands of places, an endless integer, a date."""

from collections.abc import Iterator
from typing import Any

from spotune.contracts.errors import InputError, shown

_MOST_BITS = 4096  # Python writes no integer of more than 4300 digits
_MOST_VALUES = 100_000


def refuse_endless(value: Any, where: object) -> None:
    """Raises InputError naming the key that holds itself, as in ``env: &e {A: *e}``, or too many digits or values."""
    _count(value, where, "", (), {})


def _count(value: Any, where: object, key: str, above: tuple[int, ...], known: dict[int, int]) -> int:
    """How many values it is when written without aliases; each is looked at once."""
    if id(value) in above:
        raise InputError(where, "holds itself", key=key, remedy="no alias inside what it names")
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        raise InputError(where, f"{shown(value)} is too large", key=key)
    if id(value) not in known:
        inside = _inside(value, key)
        known[id(value)] = 1 + sum(_count(inner, where, name, (*above, id(value)), known) for name, inner in inside)
    if known[id(value)] > _MOST_VALUES:
        raise InputError(where, f"more than {_MOST_VALUES:,} values", key=key, remedy="fewer aliases of aliases")
    return known[id(value)]


def refuse_dates(value: Any, where: object, key: str = "") -> None:
    """Raises InputError naming the first value that JSON has no word for: a date, bytes, a set."""
    if not isinstance(value, (dict, list, str, int, float, type(None))):
        raise InputError(where, f"{shown(str(value))} is read as a {type(value).__name__}", key=key, remedy="quote it")
    for name, inner in _inside(value, key):
        refuse_dates(inner, where, name)


def _inside(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of what a mapping or list holds."""
    if isinstance(value, dict):
        yield from ((f"{key}.{name}" if key else str(name), inner) for name, inner in value.items())
    elif isinstance(value, list):
        yield from ((f"{key}[{index}]", inner) for index, inner in enumerate(value))
