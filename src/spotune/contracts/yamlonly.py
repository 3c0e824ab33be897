"""What YAML can say and JSON cannot: a value inside itself, an integer without end (in hex), a date."""

from collections.abc import Iterator
from typing import Any

from spotune.contracts.errors import InputError, shown

_MOST_BITS = 4096  # Python writes no integer of more than 4300 digits


def refuse_endless(value: Any, where: object) -> None:
    """Raises InputError naming the key that holds itself, as in ``env: &e {A: *e}``, or too many digits."""
    _walk(value, where, "", (), set())


def _walk(value: Any, where: object, key: str, above: tuple[int, ...], done: set[int]) -> None:
    if id(value) in above:
        raise InputError(where, "holds itself", key=key, remedy="no alias inside what it names")
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        raise InputError(where, f"{shown(value)} is too large", key=key)
    if id(value) not in done:
        for name, inner in _inside(value, key):
            _walk(inner, where, name, (*above, id(value)), done)
        done.add(id(value))


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
