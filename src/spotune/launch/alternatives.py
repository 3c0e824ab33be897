"""What a task may run on instead: SkyPilot's ``any_of`` and ``ordered``, whose entries' words win over those above."""

from collections.abc import Mapping, Sequence
from typing import Any

LISTS = ("any_of", "ordered")


def each_of(resources: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every alternative as a whole, as listed; the resources themselves where there is none."""
    common = {name: value for name, value in resources.items() if name not in LISTS}
    listed = [one for name in LISTS for one in resources.get(name) or [] if isinstance(one, Mapping)]
    return [{**common, **one} for one in listed] or [common]


def may_be_spot(resources: Mapping[str, Any]) -> bool:
    return any(one.get("use_spot") for one in each_of(resources))


def override(resources: Mapping[str, Any], changes: Mapping[str, Any], without: Sequence[str] = ()) -> dict[str, Any]:
    """``resources`` with ``changes`` and not the keys of ``without``, whichever alternative is taken.

    Alternatives that differ in nothing any more are one.
    """
    wanted = {**{name: value for name, value in resources.items() if name not in without}, **changes}
    for name in LISTS:
        if isinstance(wanted.get(name), list):
            left = [_stripped(one, [*changes, *without]) for one in wanted.pop(name)]
            distinct = [one for index, one in enumerate(left) if one not in left[:index]]
            if distinct not in ([], [{}]):
                wanted[name] = distinct
    return wanted


def _stripped(one: Any, names: Sequence[str]) -> Any:
    """What is no mapping stays, for SkyPilot to refuse."""
    return {name: value for name, value in one.items() if name not in names} if isinstance(one, Mapping) else one
