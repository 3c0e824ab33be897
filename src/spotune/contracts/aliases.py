"""YAML's anchors let a value hold itself, which no JSON can say."""

from typing import Any

from spotune.contracts.errors import InputError


def refuse_cycles(value: Any, where: object) -> None:
    """Raises InputError naming the key whose mapping or list holds itself, as in ``env: &e {A: *e}``."""
    _walk(value, where, "", (), set())


def _walk(value: Any, where: object, key: str, above: tuple[int, ...], done: set[int]) -> None:
    if id(value) in above:
        remedy = "no alias inside what it names"
        raise InputError(where, "holds itself", key=key, remedy=remedy)
    if not isinstance(value, (dict, list)) or id(value) in done:
        return
    for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
        step = f"[{name}]" if isinstance(value, list) else f".{name}" if key else str(name)
        _walk(inner, where, f"{key}{step}", (*above, id(value)), done)
    done.add(id(value))
