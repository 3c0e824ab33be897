"""What somebody else, a crash or another version may leave in a bucket, on a disk or on a connection."""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

Facts = dict[str, Any]
Change = Callable[[Facts], object]
WHOLE = {"size": 5, "sha256": "0" * 64}

# Any JSON, with a liking for what breaks programs.
leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-(10**40), 10**40), st.floats(), st.text(max_size=8),
    st.sampled_from(["", "1", "nan", "\ud800", "a\nb", "../x", 10**9, -1, 1e300, 1.7e12, 0]),
)  # fmt: skip
values = st.recursive(
    leaves,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=6,
)


@st.composite
def changed(draw: st.DrawFn, whole: Facts) -> Facts:
    """A JSON object with another value somewhere, in a field or deeper, or without a field."""
    facts: Any = json.loads(json.dumps(whole))
    place, name = facts, draw(st.sampled_from(sorted(facts)))
    while isinstance(place[name], (dict, list)) and place[name] and draw(st.booleans()):
        place = place[name]
        name = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else list(range(len(place)))))
    if isinstance(place, dict) and draw(st.integers(0, 9)) == 0:
        del place[name]
    else:
        place[name] = draw(values)
    return dict(facts)


# Ways in which ``spoil`` damages a file.
HOW = ("empty", "cut", "zeros", "list", "null", "text", "deep", "odd", "folder", "loop", "pipe")


def spoil(path: Path, how: str) -> None:
    """Puts something else into the place of a file."""
    whole = path.read_bytes() if path.is_file() else b""
    if path.is_dir():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
    if not path.parent.is_dir():
        return
    if how == "folder":
        path.mkdir()
    elif how == "loop":
        path.symlink_to(path.name)
    elif how == "pipe":
        os.mkfifo(path)
    else:
        contents = {
            "empty": b"",
            "cut": whole[: len(whole) // 2],
            "zeros": b"\0" * max(1, len(whole)),
            "list": b"[1]",
            "null": b"null",
            "text": b'"x"',
            "deep": b"[" * 100_000,
            "odd": b'{"run_id": 7, "environ": 1, "at": "x", "exit_code": null, "slots": "x", "step": "x"}',
        }
        path.write_bytes(contents[how])


# Commits: each is a change of a whole one, and none may be continued.


def named(name: str) -> Change:
    """The commit with one more file of that name."""
    return lambda facts: facts["files"].update({name: WHOLE})


def of_file(**wrong: Any) -> Change:
    """The commit with other facts of one file; None: without the fact."""

    def change(facts: Facts) -> None:
        file = facts["files"]["scheduler.pt"]
        file.update(wrong)
        for name in [name for name, value in wrong.items() if value is None]:
            del file[name]

    return change


def deep(levels: int) -> Any:
    return json.loads("[" * levels + "]" * levels)


COMMITS: dict[str, Change] = {
    **{f"{field} is {value!r}"[:60]: (lambda facts, field=field, value=value: facts.update({field: value}))
       for field, values in {
           "step": ("20", 20.5, True, None, -1, 21, 10**30),
           "attempt": ("1", 2, [1], -1, 10**9),
           "run_id": ("another-run", 7, None),
           "world_size": (0, -1, 10**9, 2**62, "1", 1.0),
           "threads": (0, 10**9, "all"),
           "epoch": (float("nan"), float("inf"), -1.0, "0.5", None),
           "tokens": (-1, 1e300, "many", 2**60),
           "global_batch": (-8, "8"),
           "ordinal": (-1, {}),
           "revision": (-1, "0"),
           "best_step": ("20", -1, 3, [20]),
           "parent": (7, ["a"], "\ud800"),
           "versions": ([], {"torch": 2}, "torch"),
           "saving": ({"stall_s": "x"}, {"stall_s": -1.0}, {"stall_s": float("nan")}, []),
           "committed_at": ("now", -1.0, 1e15),
           "config_sha256": (7, None),
           "files": ([], "all", None, {}, {"scheduler.pt": []}, {"scheduler.pt": None}),
       }.items() for value in values},
    **{f"a file named {name!r}"[:60]: named(name) for name in (
        "/tmp/spotune-hostile", "../hostile", "a/../../hostile", "..", ".", "", "a//b", "a/", "./a", "a\0b", "\ud800",
        "scheduler.pt/inside", "x" * 300, "a/" * 600 + "a")},
    **{f"a file with {wrong!r}"[:60]: of_file(**wrong) for wrong in (
        {"size": None}, {"size": -1}, {"size": "5"}, {"size": 1.5}, {"size": True}, {"size": 2**80}, {"size": 10**12},
        {"sha256": None}, {"sha256": "x" * 64}, {"sha256": "A" * 64}, {"sha256": ""}, {"sha256": 7},
        {"sha256": "0" * 63 + "\n"})},
    "without files": lambda facts: facts.pop("files"),
    "without a step": lambda facts: facts.pop("step"),
    "a field nested without end": lambda facts: facts["files"]["scheduler.pt"].update(more=deep(200), size=None),
}  # fmt: skip
TEXTS = {
    "empty": b"",
    "null": b"null",
    "a list": b"[]",
    "cut": b'{"step": 20',
    "brackets": b"[" * 100_000,
    "objects": b'{"a":' * 100_000,
    "digits": b'{"step": ' + b"9" * 10_000 + b"}",
    "not UTF-8": b"\xff\xfe\x00",
    "NaN": b"NaN",
    "twice": b'{"step": 20, "step": "x", "attempt": 1}',
    "megabytes": b'{"step": "' + b"x" * (4 << 20) + b'"}',
}


def hostile_commits(whole: bytes) -> dict[str, bytes]:
    """Commits by what is wrong with them, made from a whole one of step 20 and attempt 1."""
    found = dict(TEXTS)
    for name, change in COMMITS.items():
        facts = json.loads(whole)
        change(facts)
        found[name] = json.dumps(facts).encode()
    return found
