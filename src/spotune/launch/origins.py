"""Lists what a run takes from elsewhere, so that a plan shows all that its user agrees to."""

import os
import pwd
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spotune.contracts.basemodel import adapter_base
from spotune.contracts.change import compare, shown_leaves
from spotune.contracts.config import parse_overrides
from spotune.contracts.configkeys import is_on
from spotune.contracts.envrule import FLAG, why_refused
from spotune.contracts.errors import InfraError
from spotune.contracts.localfiles import SETTINGS
from spotune.contracts.records import RunRecord
from spotune.contracts.userfiles import read_user_json
from spotune.launch.secretfiles import secret_content

HIDDEN = "(hidden)"
MONTH = "what the month's budget leaves to it"
_OF_A_RUN = re.compile(r"(.*)/runs/([a-z][a-z0-9-]+)/")


@dataclass(frozen=True)
class Origin:
    """One thing that a run takes from elsewhere.

    Attributes:
        kind: ``override``, ``env``, ``remote code``, ``takes from`` or ``revision``.
        by: whose it is, if that is known; ``at``: since when, epoch seconds, 0 for unknown.
    """

    kind: str
    what: str
    by: str = ""
    at: float = 0.0


def origins_of(record: RunRecord, cwd: Path) -> list[Origin]:
    """What a record takes from elsewhere: overrides, ``env:``, remote code, and models and data of somebody else.

    ``cwd``: what relative paths start from.
    """
    found = [Origin("override", pair) for pair in _pairs(parse_overrides(record.overrides))]
    found += _env(record)
    if is_on(record.config, "trust_remote_code"):
        model = record.config.get("model_name_or_path")
        found.append(
            Origin("remote code", f"trust_remote_code: Python files that come with {model} run on the machine")
        )
    return [*found, *_models(record, cwd), *_data(record, cwd), *_settings(record, cwd)]


def revision_of(history: Sequence[RunRecord]) -> list[Origin]:
    """The revision in force: by whom, since when, and what it changed. Empty for a run as it was submitted."""
    if len(history) < 2:
        return []
    before, last = history[-2:]
    what = str(compare(before, last)) or MONTH
    return [Origin("revision", f"{last.revision}: {what}", last.revised_by, last.revised_at)]


def from_run(record: RunRecord, what: str) -> Origin:
    return Origin("takes from", f"{record.run_id}: {what}", record.user)


def unseen_by(user: str, history: Sequence[RunRecord]) -> list[str]:
    """Who has revised the run since ``user`` submitted or revised it; names, each once."""
    authors = [record.revised_by if record.revision else record.user for record in history]
    last = max((index for index, author in enumerate(authors) if author == user), default=-1)
    after = [record.revised_by for record in history[last + 1 :] if record.revision]
    return list(dict.fromkeys(author or "somebody" for author in after))


def owner_of(path: Path) -> str:
    """Whose a path is, if it is not this user's: by its owner, or by the home that it lies in; else empty."""
    real = Path(os.path.realpath(path.expanduser()))
    try:
        owner = real.stat().st_uid
    except OSError:
        return ""
    if owner != os.geteuid():
        return _name_of(owner)
    own = os.path.realpath(Path.home())
    home = next((home for home in _homes() if real.is_relative_to(home) and home != own), "")
    return Path(home).name if home and not real.is_relative_to(own) else ""


def _homes() -> Iterator[str]:
    """The homes of people; those of services (``/bin``, ``/var/…``) are nobody's."""
    return (os.path.realpath(user.pw_dir) for user in pwd.getpwall() if user.pw_uid >= 1000 and user.pw_dir != "/")


def _name_of(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def _pairs(given: Mapping[str, Any]) -> list[str]:
    """``key=value`` for each value of a mapping, those inside it too; what looks secret is hidden."""
    pairs = [pair for key, value in given.items() for pair in shown_leaves(key, value).items()]
    return [f"{key}={HIDDEN if secret_content(text.encode()) else text}" for key, text in pairs]


def _env(record: RunRecord) -> list[Origin]:
    env = record.config.get("env")
    if not isinstance(env, Mapping):
        return []
    return [
        Origin("env", pair.removeprefix("env.") + (f" ({FLAG}: it {why})" if (why := why_refused(str(name))) else ""))
        for name, value in env.items()
        for pair in _pairs({"env": {name: value}})
    ]


def _models(record: RunRecord, cwd: Path) -> Iterator[Origin]:
    for file in record.model_files:
        if "revision" in file:
            part, _, name = str(file["name"]).partition("hf://")
            what = "chat template" if part else "model"
            yield Origin("takes from", f"hf://{name}@{file['revision']}: {what}", name.rpartition("/")[0])
    for key, what in (("model_name_or_path", "model"), ("chat_template_path", "chat template")):
        if isinstance(named := record.config.get(key), str) and named:
            yield from _local(path := cwd / os.path.expanduser(named), named, what, record.user)
            if base := adapter_base(path):
                yield from _local(cwd / os.path.expanduser(base[0]), base[0], "base model", record.user)


def _data(record: RunRecord, cwd: Path) -> Iterator[Origin]:
    """One for each source that is remote, and one for each source with files of another user."""
    seen: set[tuple[str, str]] = set()
    for file in record.data_files:
        source, url = str(file.get("source")), str(file.get("url")).removeprefix("file://")
        is_remote = "://" in url or not os.path.exists(cwd / url)
        places = [_remote(source)] if is_remote else list(_local(cwd / url, source, "data", record.user))
        for origin in places:
            if (origin.what, origin.by) not in seen:
                seen.add((origin.what, origin.by))
                yield origin


def _settings(record: RunRecord, cwd: Path) -> Iterator[Origin]:
    """The files that a key of the config may name instead of holding a mapping."""
    for key in SETTINGS:
        if isinstance(named := record.config.get(key), str) and named and not named.lstrip().startswith("{"):
            yield from _local(cwd / os.path.expanduser(named), named, key, record.user)


def _remote(source: str) -> Origin:
    shown = HIDDEN if secret_content(source.encode()) else source
    name = source.removeprefix("hf://")
    return Origin("takes from", f"{shown}: data", name.partition("/")[0] if "://" not in name and "/" in name else "")


def _local(path: Path, named: str, what: str, user: str) -> Iterator[Origin]:
    """A path of somebody else, or of another user's run. Raises InputError where that run's record cannot be read."""
    if not os.path.exists(path):
        return
    if owner := next(filter(None, map(owner_of, (path, *_inside(path)))), ""):
        yield Origin("takes from", f"{named}: {what}", owner)
    if found := _OF_A_RUN.match(os.path.realpath(path)):
        record = Path(found[1], "runs", found[2], "run.json")
        if not os.access(record, os.R_OK):
            return  # none, or not for this user's eyes
        try:
            run = read_user_json(record)
        except OSError as error:
            raise InfraError(f"{record}: cannot be read: {error.strerror or error}") from error
        by = run.get("user") if isinstance(run, dict) else None
        if isinstance(by, str) and by != user:
            yield Origin("takes from", f"{found[2]}: {what}", by)


def _inside(path: Path) -> list[Path]:
    """What a folder has; nothing for a file, and for a folder that this user may not list."""
    try:
        return sorted(path.iterdir())
    except OSError:
        return []
