"""Lists what a run takes from elsewhere, so that a plan shows everything that its user agrees to."""

import os
import pwd
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spotune.core.config import SETTINGS, parse_overrides
from spotune.core.config_keys import FLAG, bool_of, is_on, mapping_of, why_refused
from spotune.core.errors import InfraError
from spotune.core.fingerprint import adapter_base, read_user_json
from spotune.core.records import RunRecord
from spotune.core.revisions import compare, shown_leaves
from spotune.launch.secret_files import secret_content

HIDDEN = "(hidden)"
_KERNEL = re.compile(r"[^/:|]+/[^/:|]+(?:[@:].*)?")  # of the hub; transformers tells it from ``sdpa`` likewise
_OF_A_RUN = re.compile(r"(.*)/runs/([a-z][a-z0-9-]+)/")


@dataclass(frozen=True)
class Origin:
    """One thing that a run takes from elsewhere.

    Attributes:
        kind: ``override``, ``env``, ``remote code``, ``takes from``, ``goes to`` or ``revision``.
        by: its owner, if known.
        at: since when, epoch seconds; 0 if unknown.
    """

    kind: str
    what: str
    by: str = ""
    at: float = 0.0


def origins_of(record: RunRecord, cwd: Path) -> list[Origin]:
    """Returns a record's overrides, ``env:``, remote code, and models and data of other users.

    ``cwd``: the base of relative paths.
    """
    found = [Origin("override", pair) for pair in _pairs(parse_overrides(record.overrides))]
    env = record.config.get("env")
    for name, value in env.items() if isinstance(env, Mapping) else ():
        why = why_refused(str(name))
        note = f" ({FLAG}: it {why})" if why else ""
        found += [Origin("env", pair.removeprefix("env.") + note) for pair in _pairs({"env": {name: value}})]
    if is_on(record.config, "trust_remote_code"):
        model = record.config.get("model_name_or_path")
        what = f"trust_remote_code: Python files that come with {model} run on the machine"
        found.append(Origin("remote code", what))
    return [*found, *_kernels(record), *_models(record, cwd), *_data(record, cwd), *_settings(record, cwd)]


def revision_of(user: str, history: Sequence[RunRecord]) -> list[Origin]:
    """Returns the revisions since the last record that ``user`` wrote: their authors, time and total change.

    If ``user`` wrote the newest record, returns that revision; if none, all of them. Empty for a run without revisions.
    """
    if len(history) < 2:
        return []
    first = min(max(_last_of(user, history), 0) + 1, len(history) - 1)
    before, later, last = history[first - 1], history[first:], history[-1]
    number = f"{last.revision}" if len(later) == 1 else f"{later[0].revision} to {last.revision}"
    nothing = "what the month's budget leaves to it" if len(later) == 1 else "nothing in all"
    what = str(compare(before, last)) or nothing
    by = " and ".join(dict.fromkeys(_author(record) or "somebody" for record in later))
    return [Origin("revision", f"{number}: {what}", by, last.revised_at)]


def goes_to(user: str, history: Sequence[RunRecord], record: RunRecord) -> list[Origin]:
    """Returns where the result is sent, if ``record`` has that from its history and ``user`` did not ask for it."""
    last = _last_of(user, history)
    asked = history[last].config if last >= 0 else {}
    found = []
    for key in ("output_dir", "push_to_hub", "hub_model_id"):
        value = record.config.get(key)
        is_wanted = bool_of(value) if key == "push_to_hub" else value
        if not is_wanted or value != history[-1].config.get(key) or value == asked.get(key):
            continue
        others = [other for other in history[last + 1 :] if other.config.get(key) == value]
        place = "the hub" if key == "push_to_hub" else _hidden(str(value))
        found.append(Origin("goes to", f"{place}: {key}", _author(others[0]) if others else ""))
    return found


def from_run(record: RunRecord, what: str) -> Origin:
    return Origin("takes from", f"{record.run_id}: {what}", record.user)


def unseen_by(user: str, history: Sequence[RunRecord]) -> list[str]:
    """Returns the users who revised the run since ``user`` submitted or revised it, each once."""
    after = [record.revised_by for record in history[_last_of(user, history) + 1 :] if record.revision]
    return list(dict.fromkeys(author or "somebody" for author in after))


def _last_of(user: str, history: Sequence[RunRecord]) -> int:
    return max((index for index, record in enumerate(history) if _author(record) == user), default=-1)


def _author(record: RunRecord) -> str:
    return record.revised_by if record.revision else record.user


def owner_of(path: Path) -> str:
    """Returns the other user who owns a path, or whose home contains it; empty if it is this user's."""
    real = Path(os.path.realpath(path.expanduser()))
    try:
        owner = real.stat().st_uid
    except OSError:
        return ""
    if owner != os.geteuid():
        try:
            return pwd.getpwuid(owner).pw_name
        except KeyError:
            return f"user {owner}"
    own = os.path.realpath(Path.home())
    home = next((home for home in _homes() if real.is_relative_to(home) and home != own), "")
    return Path(home).name if home and not real.is_relative_to(own) else ""


def _homes() -> Iterator[str]:
    """Yields the homes of people, not those of services (``/bin``, ``/var/…``)."""
    return (os.path.realpath(user.pw_dir) for user in pwd.getpwall() if user.pw_uid >= 1000 and user.pw_dir != "/")


def _pairs(given: Mapping[str, Any]) -> list[str]:
    """Returns ``key=value`` for each value of a mapping, also nested ones. Hides what looks secret."""
    pairs = [pair for key, value in given.items() for pair in shown_leaves(key, value).items()]
    return [f"{key}={_hidden(text)}" for key, text in pairs]


def _hidden(text: str) -> str:
    return HIDDEN if secret_content(text.encode()) else text


def _kernels(record: RunRecord) -> Iterator[Origin]:
    """Yields kernels of the hub: code that replaces the model's layers."""
    given = mapping_of(record.config.get("model_init_kwargs"))
    named = [("attn_implementation", record.config.get("attn_implementation"))]
    named += [(f"model_init_kwargs.{key}", given.get(key)) for key in ("attn_implementation", "experts_implementation")]
    for key, value in named:
        for one in value.values() if isinstance(value, dict) else (value,):
            if isinstance(one, str) and any(_KERNEL.fullmatch(part) for part in one.split("|")):
                yield Origin("remote code", f"{key}: the kernel {one} of the hub runs on the machine")
    for key in ("use_kernels", "kernel_config", "allow_all_kernels"):
        value = given.get(key)
        if value and bool_of(value) is not False:
            yield Origin("remote code", f"model_init_kwargs.{key}: kernels of the hub run on the machine")


def _models(record: RunRecord, cwd: Path) -> Iterator[Origin]:
    for file in record.model_files:
        if "revision" in file:
            part, _, name = str(file["name"]).partition("hf://")
            what = "chat template" if part else "model"
            yield Origin("takes from", f"hf://{name}@{file['revision']}: {what}", name.rpartition("/")[0])
    yield from _inner_revisions("model_init_kwargs", mapping_of(record.config.get("model_init_kwargs")))
    for key, what in (("model_name_or_path", "model"), ("chat_template_path", "chat template")):
        if isinstance(named := record.config.get(key), str) and named:
            yield from _local(path := cwd / os.path.expanduser(named), named, what, record.user)
            if base := adapter_base(path):
                yield from _local(cwd / os.path.expanduser(base[0]), base[0], "base model", record.user)


def _inner_revisions(key: str, given: Mapping[str, Any]) -> Iterator[Origin]:
    """Yields other revisions than ``model_revision``: of the model, its code or its adapter."""
    for name, value in given.items():
        if name in ("revision", "code_revision") and value:
            yield Origin("takes from", f"{key}.{name}={value}: model")
        elif isinstance(value, Mapping):
            yield from _inner_revisions(f"{key}.{name}", value)


def _data(record: RunRecord, cwd: Path) -> Iterator[Origin]:
    """Yields each remote source, and each source with files of another user, once."""
    found: dict[Origin, None] = {}
    for file in record.data_files:
        source, url = str(file.get("source")), str(file.get("url")).removeprefix("file://")
        if "://" in url or not os.path.exists(cwd / url):
            name = source.removeprefix("hf://")
            owner = name.partition("/")[0] if "://" not in name and "/" in name else ""
            found[Origin("takes from", f"{_hidden(source)}: data", owner)] = None
        else:
            found |= dict.fromkeys(_local(cwd / url, source, "data", record.user))
    yield from found


def _settings(record: RunRecord, cwd: Path) -> Iterator[Origin]:
    """Yields the files of other users that a key of the config names instead of a mapping."""
    for key in SETTINGS:
        if isinstance(named := record.config.get(key), str) and named and not named.lstrip().startswith("{"):
            yield from _local(cwd / os.path.expanduser(named), named, key, record.user)


def _local(path: Path, named: str, what: str, user: str) -> Iterator[Origin]:
    """Yields a path of another user, or of another user's run. Raises InfraError if that run's record is unreadable."""
    if not os.path.exists(path):
        return
    if owner := next(filter(None, map(owner_of, (path, *_inside(path)))), ""):
        yield Origin("takes from", f"{named}: {what}", owner)
    if found := _OF_A_RUN.match(os.path.realpath(path)):
        record = Path(found[1], "runs", found[2], "run.json")
        if not os.access(record, os.R_OK):
            return  # there is none, or this user may not read it
        try:
            run = read_user_json(record)
        except OSError as error:
            raise InfraError(f"{record}: cannot be read: {error.strerror or error}") from error
        by = run.get("user") if isinstance(run, dict) else None
        if isinstance(by, str) and by != user:
            yield Origin("takes from", f"{found[2]}: {what}", by)


def _inside(path: Path) -> list[Path]:
    """Returns a folder's entries; empty for a file, and for a folder that this user may not list."""
    try:
        return sorted(path.iterdir())
    except OSError:
        return []
