"""Extras: what is done with a certified result where the config asks for it. The run is SUCCEEDED without them.

Each is done by a process on the worker's side of seam 2, in the attempt's folder (see exchange.py):

    extras.json         guard -> process   what to do (ExtraJob)
    output/             guard -> process   the certified result
    merged/             process -> guard   the merged model, complete once there is an answer
    answer-<name>.json  process -> guard   how it ended (Answer), last
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spotune.contracts.configkeys import is_on
from spotune.contracts.records import Record
from spotune.contracts.shapes import plain

EXTRAS = "extras.json"
MERGED = "merged"
MERGE, PUSH = "merge", "push"
FACTS = {MERGE: ("check",), PUSH: ("repo_id", "oid", "url")}  # what an answer has to say when it is done
CONFIG_KEYS = {MERGE: "merge_adapter", PUSH: "push_to_hub"}


@dataclass(frozen=True)
class ExtraJob:
    """The certified result, and the config that it was trained with."""

    run_id: str
    step: int
    weights_sha256: str
    config: dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """``message``: one line for people; ``facts``: for the mark."""

    done: bool
    message: str = ""
    facts: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", plain(self.message))


@dataclass(frozen=True, kw_only=True)
class Pushed(Record):
    """``pushed.json``: the result is on the hub, as commit ``oid`` of ``repo_id``."""

    run_id: str
    attempt: int
    repo_id: str
    oid: str
    url: str = ""
    at: float = 0.0


def asked_for(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The extras that a config asks for, in the order in which they are done."""
    return tuple(name for name, key in CONFIG_KEYS.items() if is_on(config, key))


def answer_path(folder: Path, name: str) -> Path:
    return folder / f"answer-{name}.json"
