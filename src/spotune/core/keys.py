"""The keys of a bucket, and what the fields of its records may hold."""

import re
from collections.abc import Callable, Collection
from dataclasses import MISSING, dataclass, fields
from functools import cache
from random import Random
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from spotune.core.errors import InputError, shown

# Which texts may be keys, and names of files in a record: relative, plain, and short enough for every store.

NAME_BYTES = 255  # of one part of a key: what a file system takes
KEY_BYTES = 1024  # of a whole key: what S3 and GCS take
MOST_PARTS = 64


def is_key(key: object) -> bool:
    """Returns whether a text names a place below a folder: no empty part, no ``.`` or ``..``, no NUL, not too long."""
    if not isinstance(key, str) or "\0" in key:
        return False
    parts = key.split("/")
    if len(parts) > MOST_PARTS or any(part in ("", ".", "..") for part in parts):
        return False
    if key.isascii():
        return len(key) <= KEY_BYTES and max(map(len, parts)) <= NAME_BYTES
    sizes = [len(part.encode(errors="surrogatepass")) for part in parts]
    return sum(sizes) + len(parts) - 1 <= KEY_BYTES and max(sizes) <= NAME_BYTES


def name_fault(names: Collection[str]) -> str:
    """Returns the first name that no file can have beside the others; empty where all can be files of one folder."""
    for name in names:
        if not is_key(name) or not _is_printed_whole(name):
            return name
        above = name
        while above := above.rpartition("/")[0]:
            if above in names:
                return name
    return ""


def number_of(text: str, digits: int, most: int) -> int | None:
    """Returns the number that a key writes in so many digits or more; None for any other text, and above ``most``."""
    if not (text.isascii() and text.isdigit()) or len(text) > 16:
        return None
    number = int(text)
    return number if number <= most and text == f"{number:0{digits}d}" else None


def _is_printed_whole(text: str) -> bool:
    """Half a surrogate pair is a str, but no name that each file system takes."""
    return text.isascii() or text.encode(errors="ignore").decode() == text


# What the fields of a record may hold, and which texts may be keys or file names.

# What the fields of a record may hold, from the annotations of its class.
#
# A bucket is shared: what is read from it was written by others, now or by another version. Looked at once, here, a
# value of another type, or a time that is none, is a bad record with a field to name, and nothing later has to expect
# it.

Time = Annotated[float, "epoch seconds, 1970 to 2200; 0 by default: not said"]
Step = Annotated[int, "a step of training, or a number of steps"]
AttemptNumber = Annotated[int, "an attempt; 0: none"]
Ranks = Annotated[int, "processes, threads or machines that work together"]
Count = Annotated[int, "what is counted"]
Amount = Annotated[float, "what is measured and not below 0"]
Price = Annotated[float, "US dollars an hour, of one machine"]
ExitCode = Annotated[int, "of a process that did not succeed"]
Files = Annotated[dict[str, dict[str, Any]], "relative path -> {size: bytes, sha256: hex}"]

RECORD_MOST_BYTES = 64 << 20  # a commit of a hundred thousand files has a quarter of it
MOST = 2**53  # of what is counted: more is no count, and more than JSON and SQLite are sure to keep
MOST_STEPS = 10**12
MOST_ATTEMPTS = 10**6  # a machine a minute, for two years
MOST_RANKS = 2**17
HOUR_S = 3600.0
MOST_USD = 1e9  # of a budget or a bill: more is a slip
MOST_USD_PER_HOUR = 10**7
_DEEPEST = 64  # lists and objects in each other: more cannot be copied and written again by Python's own means
_GREATEST = 1e100  # of what is measured: products of some of these are finite
YEAR_2000 = 946_684_800  # a machine whose clock says less has not set it; half a century is paid for by nobody
_SHA256 = re.compile("[0-9a-f]{64}")
YEAR_2200 = 7_258_118_400  # a time in milliseconds is far beyond it

Check = tuple[str, Callable[[Any], bool]]  # what is expected, in words, and whether a value is that
Kind = TypeVar("Kind")


def checked(record: type, values: dict[str, Any]) -> dict[str, Any]:
    """The values of the fields that the class has. Raises ValueError, naming the field, for one that is missing, or is
    not what the class says, down to the innermost value."""
    checks, found = _checks(record), {}
    for name, value in values.items():
        if check := checks.get(name):
            try:
                fits = check[1](value)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            if not fits:
                raise ValueError(f"{name}: not {check[0]}: {_shown(value)}")
            found[name] = value
    if missing := _required(record) - found.keys():
        raise ValueError(f"{min(missing)}: missing")
    return found


def build(kind: type[Kind], values: Any) -> Kind:
    """Returns a dataclass made from a JSON object; fields that the class does not have are ignored.

    Raises ValueError, naming the field, for any other value.
    """
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    return kind(**checked(kind, values))


def plain(text: str) -> str:
    """Returns a text that can be kept: half a surrogate pair, as in a file's name that is not UTF-8, is escaped."""
    return text.encode(errors="backslashreplace").decode()


def fits(record: type, name: str, value: Any) -> bool:
    """Returns whether a value is what the class says of this field."""
    try:
        return _checks(record)[name][1](value)
    except ValueError:  # out of bounds
        return False


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
    return f"an object{of_each}", lambda value: _is_object(value) and all(map(fits, value.values()))


def clock_fault(now: float) -> str:
    """Returns what is wrong with a clock that says ``now`` (epoch seconds): records with such a time are refused."""
    if YEAR_2000 <= now < YEAR_2200:
        return ""
    return f"its clock is set {'before the year 2000' if now < YEAR_2000 else 'after the year 2199'}"


def check_files(files: Any) -> None:
    """Raises ValueError, naming the file, for what is not ``{relative path: {size: bytes, sha256: hex}}``."""
    if not _is_object(files):
        raise ValueError(f"not an object: {_shown(files)}")
    for name, facts in files.items():
        if type(facts) is not dict:
            raise ValueError(f"{_shown(name)}: not an object: {_shown(facts)}")
        if not is_whole(facts.get("size")) or facts["size"] < 0:
            raise ValueError(f"{_shown(name)}: size: not a number of bytes: {_shown(facts.get('size'))}")
        if type(facts.get("sha256")) is not str or not _SHA256.fullmatch(facts["sha256"]):
            raise ValueError(f"{_shown(name)}: sha256: not 64 hexadecimal digits: {_shown(facts.get('sha256'))}")
    if wrong := name_fault(files):
        raise ValueError(f"{_shown(wrong)}: not the name of a file in this folder, beside the others")


def _are_files(value: Any) -> bool:
    check_files(value)
    return True


def _is_object(value: Any) -> bool:
    return type(value) is dict and all(map(_is_text, value))


def _is_json(value: Any) -> bool:
    """Anything, but no text that cannot be kept, and nothing that is nested without end."""
    here, depth = [value], 0
    while here and depth <= _DEEPEST:
        inner: list[Any] = []
        for one in here:
            if isinstance(one, str) and not _is_text(one):
                return False
            if isinstance(one, dict):
                inner += [*one, *one.values()]
            elif isinstance(one, list):
                inner += one
        here, depth = inner, depth + 1
    return not here


def _bounded(is_kind: Callable[[Any], bool], low: int, high: float) -> Callable[[Any], bool]:
    """Fits a value of a kind; raises ValueError for one of that kind which is out of bounds."""

    def fits(value: Any) -> bool:
        if is_kind(value) and not low <= value <= high:
            bounds = f"from {low} to {high}" if high < _GREATEST else f"{low} or more"
            raise ValueError(f"not {bounds}: {_shown(value)}")
        return is_kind(value)

    return fits


def _is_text(value: Any) -> bool:
    """Half a surrogate pair is a str, but nothing that can be printed or kept."""
    return type(value) is str and (value.isascii() or value.encode(errors="ignore").decode() == value)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -_GREATEST < value < _GREATEST  # of NaN neither is so


def is_whole(value: Any) -> bool:
    return type(value) is int and -MOST < value < MOST


def _is_time(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < YEAR_2200


_PLAIN: dict[Any, Check] = {
    Any: (f"plain text, and at most {_DEEPEST} deep", _is_json),
    NoneType: ("null", lambda value: value is None),
    str: ("a text", _is_text),
    bool: ("true or false", lambda value: type(value) is bool),
    int: ("a whole number", is_whole),
    float: ("a number", _is_number),
    Time: ("a time in epoch seconds", _is_time),
    Step: ("a whole number", _bounded(is_whole, 0, MOST_STEPS)),
    AttemptNumber: ("a whole number", _bounded(is_whole, 0, MOST_ATTEMPTS)),
    Ranks: ("a whole number", _bounded(is_whole, 1, MOST_RANKS)),
    Count: ("a whole number", _bounded(is_whole, 0, MOST)),
    Amount: ("a number", _bounded(_is_number, 0, _GREATEST)),
    Price: ("a number", _bounded(_is_number, 0, MOST_USD_PER_HOUR)),
    ExitCode: ("a whole number", _bounded(is_whole, 1, 255)),
    Files: ("files", _are_files),
}


def _shown(value: Any) -> str:
    """In a few characters, on one line."""
    text = {list: "[…]", dict: "{…}", NoneType: "null"}.get(type(value)) or ascii(value)
    return text if len(text) <= 40 else f"{text[:39]}…"


# Run identity and the layout of the bucket: the one place that knows where anything is.
#
# runs/<run_id>/run.json                              what was submitted; create-only runs/<run_id>/revisions/<4d>.json
# what was changed since: the highest is in force; create-only runs/<run_id>/code/
# commit, and the diff when dirty runs/<run_id>/attempts/<4d>/attempt.json            claims the attempt (the fence);
# create-only runs/<run_id>/attempts/<4d>/events-<rank>-<n>.jsonl phase changes, steps, losses; never rewritten
# runs/<run_id>/attempts/<4d>/stacks-<rank>.txt       what the ranks did when the watchdog ended it; create-only
# runs/<run_id>/attempts/<4d>/bill.json               price row and paid interval; create-only
# runs/<run_id>/lost/<start>-<end, epoch ms>.json     bill of a machine that went before it claimed; create-only
# runs/<run_id>/progress.json                         latest step, phase, loss, heartbeat; overwritten
# runs/<run_id>/checkpoints/<step 8d>-<attempt 4d>/   Trainer's checkpoint-N layout; never rewritten
# runs/<run_id>/commits/<attempt 4d>-<step 8d>.json   the commit, create-only, last runs/<run_id>/output/
# output/completed.json        the result and its certificate runs/<run_id>/merged/  merged/completed.json        the
# adapter merged into its base, where asked for; its certificate runs/<run_id>/pushed.json                           the
# result is on the hub, where asked for; create-only runs/<run_id>/paused.json failed.json cancelled.json
# clusters/<name>-<launch>.json                       a dev cluster's paid spans; rewritten by the launcher as they grow
# late/<run_id>                                       a bill was written after the run was certified; empty

RUN_ID = re.compile(r"[a-z][a-z0-9-]{1,23}[a-z0-9]")
RUNS = "runs"
CLUSTERS = "clusters"
LATE = "late"


def check_run_id(run_id: str, where: str = "--name") -> str:
    """Returns ``run_id`` when it is one, else raises InputError."""
    if not RUN_ID.fullmatch(run_id):
        remedy = "3 to 25 of a-z, 0-9 and '-', a letter first, no '-' at the end"
        raise InputError(where, f"{shown(run_id)} is not a run id", remedy=remedy)
    return run_id


def new_run_id(name: str, rng: Random) -> str:
    """A run id from a config's name and a short random part, e.g. ``demo-orders-k3x9``."""
    stem = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    stem = re.sub(r"^[^a-z]+", "", stem)[:20].rstrip("-") or "run"
    return f"{stem}-{''.join(rng.choices('abcdefghijkmnpqrstuvwxyz23456789', k=4))}"


@dataclass(frozen=True)
class Keys:
    """The keys of one run, relative to the bucket's root."""

    run_id: str

    @property
    def root(self) -> str:
        return f"{RUNS}/{self.run_id}"

    @property
    def run(self) -> str:
        return f"{self.root}/run.json"

    @property
    def revisions(self) -> str:
        return f"{self.root}/revisions"

    @property
    def code(self) -> str:
        return f"{self.root}/code"

    @property
    def progress(self) -> str:
        return f"{self.root}/progress.json"

    @property
    def attempts(self) -> str:
        return f"{self.root}/attempts"

    @property
    def commits(self) -> str:
        return f"{self.root}/commits"

    @property
    def checkpoints(self) -> str:
        return f"{self.root}/checkpoints"

    @property
    def output(self) -> str:
        return f"{self.root}/output"

    @property
    def completed(self) -> str:
        return f"{self.output}/completed.json"

    @property
    def merged(self) -> str:
        return f"{self.root}/merged"

    @property
    def merge_completed(self) -> str:
        return f"{self.merged}/completed.json"

    @property
    def pushed(self) -> str:
        return f"{self.root}/pushed.json"

    @property
    def failed(self) -> str:
        return f"{self.root}/failed.json"

    @property
    def paused(self) -> str:
        return f"{self.root}/paused.json"

    @property
    def cancelled(self) -> str:
        return f"{self.root}/cancelled.json"

    def record(self, revision: int) -> str:
        """The record of that revision; 0 is the one that was submitted."""
        return self.revision(revision) if revision else self.run

    def revision(self, revision: int) -> str:
        return f"{self.revisions}/{revision:04d}.json"

    def attempt(self, attempt: int) -> str:
        return f"{self.attempts}/{attempt:04d}/attempt.json"

    def bill(self, attempt: int) -> str:
        return f"{self.attempts}/{attempt:04d}/bill.json"

    @property
    def late(self) -> str:
        return f"{LATE}/{self.run_id}"

    @property
    def lost(self) -> str:
        return f"{self.root}/lost"

    def lost_bill(self, started_at: float, ended_at: float) -> str:
        """Of a machine that was paid for in that time, epoch seconds, and never claimed an attempt."""
        return f"{self.lost}/{round(started_at * 1000)}-{round(ended_at * 1000)}.json"

    def events(self, attempt: int, rank: int, part: int) -> str:
        return f"{self.attempts}/{attempt:04d}/events-{rank}-{part}.jsonl"

    def stacks(self, attempt: int, rank: int) -> str:
        return f"{self.attempts}/{attempt:04d}/stacks-{rank}.txt"

    def checkpoint(self, step: int, attempt: int) -> str:
        return f"{self.checkpoints}/{step:08d}-{attempt:04d}"

    def commit(self, attempt: int, step: int) -> str:
        return f"{self.commits}/{attempt:04d}-{step:08d}.json"


def cluster_key(name: str, launched_at: float) -> str:
    """The record of the cluster of that name that came up then, epoch seconds."""
    return f"{CLUSTERS}/{name}-{int(launched_at)}.json"


def revision_of(key: str) -> int | None:
    """The number of a revision's key, None for any other key."""
    found = re.search(r"/revisions/([^/]+)\.json\Z", key)
    return number_of(found[1], 4, MOST) if found else None


def attempt_of(key: str) -> int | None:
    """The attempt number in a key below ``attempts/``, None for any other key."""
    found = re.search(r"/attempts/([^/]+)/", key)
    return attempt_number(found[1]) if found else None


def attempt_number(name: str) -> int | None:
    """The attempt that a folder of ``attempts/`` is named after, None for any other name."""
    return number_of(name, 4, MOST_ATTEMPTS)


def commit_of(key: str) -> tuple[int, int] | None:
    """(attempt, step) of a commit's key, None for any other key; the highest is the newest."""
    found = re.search(r"/commits/([^/-]+)-([^/-]+)\.json\Z", key)
    return _pair(found[1], found[2]) if found else None


def checkpoint_of(name: str) -> tuple[int, int] | None:
    """(attempt, step) that a folder of ``checkpoints/`` is named after, None for any other name."""
    step, _, attempt = name.partition("-")
    return _pair(attempt, step)


def _pair(attempt: str, step: str) -> tuple[int, int] | None:
    numbers = attempt_number(attempt), number_of(step, 8, MOST_STEPS)
    return None if numbers[0] is None or numbers[1] is None else (numbers[0], numbers[1])
