"""What the fields of a record may hold, from the annotations of its class.

A bucket is shared: what is read from it was written by others, now or by another version. Looked at once, here, a value
of another type, or a time that is none, is a bad record with a field to name, and nothing later has to expect it.
"""

from collections.abc import Callable
from dataclasses import MISSING, fields
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

Time = Annotated[float, "epoch seconds, 1970 to 2200; 0 by default: not said"]

MOST = 2**53  # of what is counted: more is no count, and more than JSON and SQLite are sure to keep
_GREATEST = 1e100  # of what is measured: products of some of these are finite
YEAR_2000 = 946_684_800  # a machine whose clock says less has not set it; half a century is paid for by nobody
YEAR_2200 = 7_258_118_400  # a time in milliseconds is far beyond it

Check = tuple[str, Callable[[Any], bool]]  # what is expected, in words, and whether a value is that


def checked(record: type, values: dict[str, Any]) -> dict[str, Any]:
    """The values of the fields that the class has. Raises ValueError, naming the field, for one that is missing, or is
    not what the class says."""
    checks, found = _checks(record), {}
    for name, value in values.items():
        if check := checks.get(name):
            if not check[1](value):
                raise ValueError(f"{name}: not {check[0]}: {_shown(value)}")
            found[name] = value
    if missing := _required(record) - found.keys():
        raise ValueError(f"{min(missing)}: missing")
    return found


def fits(record: type, name: str, value: Any) -> bool:
    """Returns whether a value is what the class says of this field."""
    return _checks(record)[name][1](value)


@cache
def _checks(record: type) -> dict[str, Check]:
    return {name: _check(kind) for name, kind in get_type_hints(record, include_extras=True).items()}


@cache
def _required(record: Any) -> frozenset[str]:
    without = (one for one in fields(record) if one.default is MISSING and one.default_factory is MISSING)
    return frozenset(one.name for one in without)


def _check(kind: Any) -> Check:
    origin, kinds = get_origin(kind), get_args(kind)
    if kind in _PLAIN:
        return _PLAIN[kind]
    if origin in (Union, UnionType):
        checks = [_check(one) for one in kinds]
        return " or ".join(words for words, _ in checks), lambda value: any(fits(value) for _, fits in checks)
    if origin is Literal:
        return f"one of {', '.join(map(str, kinds))}", lambda value: isinstance(value, str) and value in kinds
    words, fits = _check(kinds[-1])
    of_each = "" if kinds[-1] is Any else f" (each {words})"
    if origin is list:
        return f"a list{of_each}", lambda value: type(value) is list and all(map(fits, value))
    return f"an object{of_each}", lambda value: type(value) is dict and all(map(fits, value.values()))


def is_whole(value: Any) -> bool:
    """Returns whether a value is a whole number that a record may hold."""
    return type(value) is int and -MOST < value < MOST


def _is_text(value: Any) -> bool:
    """Half a surrogate pair is a str, but nothing that can be printed or kept."""
    return type(value) is str and (value.isascii() or value.encode(errors="ignore").decode() == value)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -_GREATEST < value < _GREATEST  # of NaN neither is so


def _is_time(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < YEAR_2200


_PLAIN: dict[Any, Check] = {
    Any: ("anything", lambda value: True),
    NoneType: ("null", lambda value: value is None),
    str: ("a text", _is_text),
    bool: ("true or false", lambda value: type(value) is bool),
    int: ("a whole number", is_whole),
    float: ("a number", _is_number),
    Time: ("a time in epoch seconds", _is_time),
}


def _shown(value: Any) -> str:
    """In a few characters, on one line."""
    text = {list: "[…]", dict: "{…}", NoneType: "null"}.get(type(value)) or ascii(value)
    return text if len(text) <= 40 else f"{text[:39]}…"
