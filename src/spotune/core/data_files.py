"""Files that a user names: data files on disk and in stores, and small text files."""

import glob
import json
import logging
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spotune.core.errors import InputError, SpotuneError, StoreError
from spotune.core.machine_faults import is_machine_fault
from spotune.core.store.faults import Fault, judge, words_of

# Reads a small text file that a user names, or that lies in a folder of a mate's: a config, a plan, an adapter's base.
#
# Never waits, and never reads without end.

MOST_BYTES = 16 << 20
_KINDS = {stat.S_IFIFO: "a FIFO", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFDIR: "a folder"}


def read_user_file(path: str | Path) -> str:
    """Returns the text of a file.

    Raises:
        InputError: it is missing, is not a plain file, has more than 16 MiB or is not UTF-8.
        OSError: the machine's disk failed.
    """
    try:
        # A FIFO without a writer would let a plain open wait for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
            if kind != stat.S_IFREG:
                raise InputError(path, f"is {_KINDS.get(kind, 'not a file')}", remedy="name a plain file")
            with open(descriptor, "rb", closefd=False) as file:
                data: bytes | None = file.read(MOST_BYTES + 1)
        finally:
            os.close(descriptor)
    except FileNotFoundError as error:
        raise InputError(path, "no such file") from error
    except (OSError, ValueError) as error:  # the latter: a NUL in the name
        if is_machine_fault(error):
            if isinstance(error, OSError):
                error.filename = error.filename or str(path)  # a read does not name its file
            raise
        raise InputError(path, f"cannot be read: {error}") from error
    if data is None:  # a file of the kernel's without anything to say just now
        raise InputError(path, "cannot be read: it would have to be waited for", remedy="name a plain file")
    if len(data) > MOST_BYTES:
        raise InputError(path, f"has more than {MOST_BYTES >> 20} MiB", remedy="is it the right file?")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InputError(path, f"cannot be read: {error}", remedy="save the file as UTF-8") from error


def read_user_json(path: str | Path) -> Any:
    """Returns what a JSON file holds. Raises as ``read_user_file``, and InputError for what is not JSON."""
    try:
        return json.loads(read_user_file(path).removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:  # the latter: brackets without end
        raise InputError(path, f"cannot be read: not JSON: {error}") from error


# Data files: which names are data, and which files a ``source:`` names, on disk and in stores.
#
# One rule for a folder, a pattern and a single name: the ending says what a file is, in any case, and ``.gz`` or
# ``.zst`` may follow it. A path that exists is that path, whatever characters it has; only a path that does not exist
# is read as a pattern.

ENDINGS = {
    **{".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"},
    **{".arrow": "arrow", ".feather": "arrow", ".ipc": "arrow"},
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
FORMS = "JSONL, NDJSON, JSON, CSV, Parquet or Arrow, also .gz or .zst"
_CHECKSUMS = ("ETag", "etag", "md5Hash", "generation", "checksum")
_HELD_OUT = re.compile(r"(^|[-_.])(test|val|valid|validation|dev|eval|evaluation|held-?out)([-_.]|$)", re.IGNORECASE)
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_MOST_NAMED = 4
_MOST_FILES = 100_000
_SYSTEM = ("/proc", "/sys", "/dev")  # folders of the kernel: files without end
PROTOCOLS = ("s3", "gs", "gcs", "hf", "http", "https", "memory")


@dataclass(frozen=True)
class Found:
    """What a source names.

    Attributes:
        files: paths or URLs of the data files, sorted.
        left_out: names of files in a folder or under a pattern that are not data by their ending.
    """

    files: list[str]
    left_out: list[str]


def kind_of(name: str) -> tuple[str, str] | None:
    """Returns (``json``, ``csv``, ``parquet`` or ``arrow``; the compression or ""), None for another ending."""
    stem, ending = os.path.splitext(name.lower())
    compression = COMPRESSIONS.get(ending, "")
    if compression:
        ending = os.path.splitext(stem)[1]
    return (ENDINGS[ending], compression) if ending in ENDINGS else None


def file_state(path: str) -> tuple[int, ...]:
    """Returns what changes whenever a file is written: size, both times in ns, inode."""
    seen = os.stat(path)
    return seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns, seen.st_ino


def changed_while_read(url: object) -> InputError:
    """Returns the error for a file whose state or checksum changed under the reader."""
    return InputError(url, "was changed while it was read", remedy="try again once nobody writes to it")


def not_as_submitted(url: object, how: str) -> InputError:
    """Returns the error for a file that is not the one in the run's record; ``how`` says in what it differs."""
    what = f"is not the file that the run was submitted with: its {how} differs"
    return InputError(url, what, remedy="put it back, or submit a new run")


def is_lfs_pointer(path: str | Path) -> bool:
    """Returns whether a file only says where Git LFS keeps its content. Raises OSError."""
    with open(path, "rb") as file:
        return file.read(len(_LFS_POINTER)) == _LFS_POINTER


def is_remote(source: str) -> bool:
    """Returns whether a source is a URL, not a path of this machine (which may hold ``::`` or ``[``)."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*(::[^:/]+)*://", source.removeprefix("file://")) is not None


def find_files(source: str, where: object, key: str) -> Found:
    """Finds the files that a source names: a file, a folder or a pattern, on disk or in a store.

    ``hf://`` and ``http(s)://`` sources are returned as they are.

    Raises:
        InputError: it names no data file.
        StoreError: the store is away.
    """
    if is_remote(source) and (protocol := source.split(":", 1)[0]) not in PROTOCOLS:
        what = f"{protocol}:// is not a store that data is read from"
        raise InputError(where, what, key=key, remedy="a path, or hf://, s3://, gs:// or https://")
    if source.startswith(("hf://", "http://", "https://")):
        return Found([source], [])
    is_one, names = _find_remote(source, where, key) if is_remote(source) else _find_local(source, where, key)
    files = [name for name in names if kind_of(name)]
    left_out = [name for name in names if not kind_of(name)]
    if is_one and not files:
        ending = os.path.splitext(source)[1] or "no ending"
        raise InputError(where, f"{source} is not a data file by its name ({ending})", key=key, remedy=FORMS)
    if not files:
        what = f"no file matches {source}"
        if left_out:
            what = f"{source} holds no data file, but {_few(left_out)}"
        raise InputError(where, what, key=key, remedy=FORMS)
    return Found(files, left_out)


def _find_local(source: str, where: object, key: str) -> tuple[bool, list[str]]:
    """(the source is one file, sorted names). Unlike Path, os.path says False for a name that is too long."""
    path = str(local_path(source.removeprefix("file://"), where, key))
    if "\0" in path:
        raise InputError(where, "the path holds a NUL character", key=key)
    if os.path.isfile(path):
        return True, [path]
    pattern = os.path.join(glob.escape(path), "**", "*") if os.path.isdir(path) else path
    return False, sorted(_walk(pattern, where, key))


def _walk(pattern: str, where: object, key: str) -> Iterator[str]:
    """The files that a pattern names. Raises InputError where looking for them would not end."""
    root = os.path.realpath(pattern[: min((pattern.find(mark) for mark in "*?[" if mark in pattern), default=None)])
    top = root if os.path.isdir(root) else os.path.dirname(root)
    if ("**" in pattern and top == "/") or any(top == one or top.startswith(f"{one}/") for one in _SYSTEM):
        what = f"{pattern.removesuffix('/**/*') or '/'} is not a place for data"
        raise InputError(where, what, key=key, remedy="name the data's own folder")
    for number, name in enumerate(glob.iglob(pattern, recursive=True)):
        if number >= _MOST_FILES:
            raise InputError(where, f"more than {_MOST_FILES:,} files", key=key, remedy="name the data's own folder")
        if os.path.isfile(name):
            yield name


def local_path(text: str, where: object, key: str) -> Path:
    """Returns the path with ``~`` expanded. Raises InputError for a user who does not exist."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise InputError(where, f"{text}: {error}", key=key) from error


def _find_remote(source: str, where: object, key: str) -> tuple[bool, list[str]]:
    protocol = source.split("://", 1)[0]
    try:
        fs, path = open_store(source)
        try:  # not isdir and exists: each would wait for a store that cannot be reached
            is_folder = fs.info(path)["type"] == "directory"
        except FileNotFoundError as error:
            if is_machine_fault(error):
                raise
            found = fs.glob(path) if any(mark in path for mark in "*?[") else []
            return False, sorted(f"{protocol}://{name}" for name in found)
        if not is_folder:
            return True, [f"{protocol}://{path}"]
        inside = sorted(fs.find(path))
    except Exception as error:
        raise unreachable(source, where, key, error) from error
    return False, [f"{protocol}://{name}" for name in inside if not Path(name).name.startswith(".")]


def open_store(url: str) -> tuple[Any, str]:
    """Returns (file system, path in it) of a URL. A ``::`` in the name of an object is part of the name."""
    import fsspec

    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it prints the traceback of what it also raises
    protocol = url.split("://", 1)[0]
    if protocol in ("gs", "gcs"):
        # The plain kind: another one asks for the bucket's type over gRPC, a minute where that cannot be reached.
        from gcsfs.core import GCSFileSystem

        fs = GCSFileSystem(use_listings_cache=False, **({"token": "anon"} if _has_emulator() else {}))
        return fs, str(fs._strip_protocol(url))
    if protocol in ("s3", "http", "https"):
        fs = fsspec.filesystem(protocol, **({"use_listings_cache": False} if protocol == "s3" else {}))
        return fs, str(fs._strip_protocol(url))
    found: tuple[Any, str] = fsspec.core.url_to_fs(url)
    return found


def _has_emulator() -> bool:
    return bool(os.environ.get("STORAGE_EMULATOR_HOST"))


def checksum_of(info: Mapping[str, Any]) -> str:
    """Returns what a store says of an object's content, from fsspec's ``info``; empty if it says nothing."""
    return str(next((info[name] for name in _CHECKSUMS if info.get(name)), "")).strip('"')


def unreachable(url: str, where: object, key: str, error: Exception) -> SpotuneError:
    """Returns a StoreError for what may pass, since another machine may reach the store, else an InputError."""
    remedy = "is the name right, are there credentials for it, and a way to it from here?"
    fault = InputError(where, f"cannot reach {url}: {words_of(error)}", key=key, remedy=remedy)
    may_pass = judge(error) in (Fault.PASSING, Fault.UNREADY) or is_machine_fault(error)
    return StoreError(str(fault)) if may_pass else fault


def notices(data: Sequence[Mapping[str, Any]] | None, where: object) -> list[str]:
    """Returns one line for each thing about the files of ``data:`` that people may not have meant.

    Files in a folder that are not read; a test file beside training files; a file in two entries.

    Raises:
        InputError: a source names no file, or a file of two entries is held out in one of them.
        StoreError: a store is away.
    """
    lines: list[str] = []
    seen: dict[str, int] = {}
    for index, entry in enumerate(data or []):
        source, key = str(entry["source"]), f"data[{index}].source"
        found = find_files(source, where, key)
        if found.left_out:
            lines.append(f"{source}: not read, since the ending is not a data file's: {_few(found.left_out)}")
        held_out = [name for name in found.files if _looks_held_out(name)]
        if 0 < len(held_out) < len(found.files) and not entry.get("split"):
            lines.append(f"{source}: {_few(held_out)} is trained on too (name the training files alone, or give split)")
        for name in found.files:
            place = name if is_remote(name) or name.startswith("hf://") else os.path.realpath(name)
            if (first := seen.setdefault(place, index)) != index:
                if entry.get("split") or (data or [])[first].get("split"):
                    what = f"{name} is in data[{first}] too, so that rows held out in one are trained on in the other"
                    raise InputError(where, what, key=key, remedy="name the file once, or leave split out")
                lines.append(f"{name}: is in data[{first}] and data[{index}], and trained on twice")
    return lines


def _looks_held_out(name: str) -> bool:
    return _HELD_OUT.search(Path(name).name.split(".")[0]) is not None


def _few(names: Sequence[str]) -> str:
    listed = ", ".join(Path(name).name for name in names[:_MOST_NAMED])
    return f"{listed} and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else listed
