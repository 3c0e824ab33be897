"""The data files of a config, and the fingerprints of data, model and config."""

import glob
import hashlib
import json
import logging
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from spotune.core.errors import InfraError, InputError, SpotuneError, StoreError
from spotune.core.io import read_object, write_state
from spotune.core.records import fingerprint
from spotune.core.store.faults import Fault, is_machine_fault, judge, words_of

# Files that a user names: data files on disk and in stores, and small text files.

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


# Fingerprints of a run's data and model, hashes of local files, and versions of libraries.

# sha256 of local files, taken in parallel and remembered on this machine: a 16 GB model is read once.
#
# A file is known again by path, size, both times and inode. Only large files are remembered, and none that was
# written within the last seconds: a second write in the same tick of the file system's clock would not show.

MEMORY = "file-hashes.json"
WORTHWHILE = 1 << 20  # bytes
SETTLED_S = 2.0


def hash_files(
    paths: Sequence[Path], cache: Path | None = None, clock: Callable[[], float] = time.time
) -> list[dict[str, Any]]:
    """``{size, sha256}`` of each file. Raises OSError for one that cannot be read.

    Args:
        paths: the files.
        cache: a folder of this machine for what is remembered; None remembers nothing.
        clock: epoch seconds.
    """
    memory = _recall(cache) if cache else {}
    began = clock()
    states = [_state(path) for path in paths]

    def facts(path: Path, state: list[int]) -> dict[str, Any]:
        known = memory.get(str(path.absolute()))
        if known and known[:-1] == state:
            return {"size": state[0], "sha256": known[-1]}
        return file_facts(path)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = list(pool.map(facts, paths, states))
    fresh = {
        str(path.absolute()): [*state, fact["sha256"]]
        for path, state, fact in zip(paths, states, found, strict=True)
        if state[0] >= WORTHWHILE and began - max(state[1], state[2]) / 1e9 > SETTLED_S and _state(path) == state
    }
    if cache and any(memory.get(path) != entry for path, entry in fresh.items()):
        _remember(cache, memory | fresh)
    return found


def _state(path: Path) -> list[int]:
    seen = path.stat()
    return [seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns, seen.st_ino, seen.st_dev]


def _recall(cache: Path) -> dict[str, list[Any]]:
    try:
        known = read_object(cache / MEMORY) or {}
    except InfraError:  # a disk that fails: everything is read again
        return {}
    return {path: entry for path, entry in known.items() if _is_entry(entry)}


def _is_entry(entry: Any) -> bool:
    """Whether it is a file's state and a sha256: half of one would be taken for the file's."""
    return isinstance(entry, list) and len(entry) == 6 and isinstance(entry[5], str) and len(entry[5]) == 64


def _remember(cache: Path, memory: dict[str, list[Any]]) -> None:
    try:
        write_state(cache / MEMORY, {path: entry for path, entry in memory.items() if os.path.exists(path)})
    except (OSError, InfraError):  # a home that cannot be written: slower, not wrong
        return


# Which model a run starts from, as a fingerprint that any machine can take again.
#
# A local folder counts by the contents of what loading it reads (configs, tokenizer, chat template, weights); a hub
# id by name and revision. An adapter's folder brings the base model that it names, a config its chat template.

MODEL_KEYS = ("model_name_or_path", "model_revision", "chat_template_path")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_OTHERS = (".json", ".jinja", ".j2", ".model", ".txt", ".tiktoken", ".py")
# A checkpoint's folder is a model's too; what only goes on training is not read.
_TRAINER = ("optimizer", "scheduler", "scaler", "rng_state", "trainer_state", "training_args", "spotune")
_MOST_NAME = 4096  # characters of a path or of a name on the hub


def model_files(config: Mapping[str, Any], where: object, cache: Path | None = None) -> list[dict[str, Any]]:
    """One ``{name, size, sha256}`` a local file, ``{name, revision}`` for what comes from a hub. Raises InputError.

    Args:
        config: the resolved config.
        where: for messages.
        cache: a folder of this machine in which hashes of large files are remembered.
    """
    key = MODEL_KEYS[0]
    try:
        found = _parts(str(config[key]), str(config.get("model_revision") or "main"), where)
        template = config.get("chat_template_path")
        if isinstance(template, str) and template:
            found += _template_parts(template, where)
        local = [(name, path) for name, path, _ in found if path]
        for _, path in local:
            if is_lfs_pointer(path):
                raise InputError(path, "is a Git LFS pointer, not the model's file", remedy="git lfs pull")
        facts = hash_files([path for _, path in local], cache)
    except OSError as error:
        if is_machine_fault(error):
            raise StoreError(f"{where}: {key}: cannot be read: {error}") from error
        raise InputError(where, f"cannot be read: {error}", key=key) from error
    hashed = [{"name": name, **fact} for (name, _), fact in zip(local, facts, strict=True)]
    return hashed + [{"name": name, "revision": revision} for name, path, revision in found if not path]


def model_sha256(files: list[dict[str, Any]]) -> str:
    """The fingerprint of the model: names, sizes and contents, whatever folder they are in."""
    return fingerprint(sorted(files, key=lambda file: str(file["name"])))


def _parts(name: str, revision: str, where: object) -> list[tuple[str, Path | None, str]]:
    """(name, path, revision) of the model's parts: a path where they are local, a revision where they are not."""
    folder = _folder(name, where)
    if folder is None:
        return [(f"hf://{name}", None, revision)]
    parts = [(path.relative_to(folder).as_posix(), path, "") for path in _files(folder, _WEIGHTS + _OTHERS)]
    return [*parts, *_base_of(folder, where)]


def adapter_base(folder: Path) -> tuple[str, str] | None:
    """(the base model, its revision) that an adapter's folder names; None for a folder without an adapter.

    Raises InputError where the adapter cannot be read or names none, StoreError where the disk failed.
    """
    path = folder / "adapter_config.json"
    if not os.path.exists(path):
        return None
    remedy = "base_model_name_or_path in it"
    try:
        adapter = read_user_json(path)
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error}") from error
    base = adapter.get("base_model_name_or_path") if isinstance(adapter, dict) else None
    if not isinstance(base, str) or not base:
        raise InputError(path, "names no base model", remedy=remedy)
    if len(base) > _MOST_NAME:
        raise InputError(path, f"names no base model: a name of {len(base)} characters", remedy=remedy)
    return base, str(adapter.get("revision") or "main")


def _base_of(folder: Path, where: object) -> list[tuple[str, Path | None, str]]:
    """The parts of the model that an adapter's folder names, none for a whole model."""
    named = adapter_base(folder)
    if named is None:
        return []
    base, revision = named
    below = _folder(base, where)
    if below is None:
        return [(f"hf://{base}", None, revision)]
    return [(f"base/{file.relative_to(below).as_posix()}", file, "") for file in _files(below, _WEIGHTS + _OTHERS)]


def _template_parts(template: str, where: object) -> list[tuple[str, Path | None, str]]:
    path = Path(template).expanduser()
    if os.path.isfile(path):
        return [(f"chat_template/{path.name}", path, "")]
    folder = _folder(template, where)
    if folder is None:
        return [(f"chat_template/hf://{template}", None, "main")]
    return [(f"chat_template/{file.relative_to(folder).as_posix()}", file, "") for file in _files(folder, _OTHERS)]


def _folder(name: str, where: object) -> Path | None:
    """The local folder of that name, as transformers looks for it; None for a hub id."""
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:  # ~name of nobody
        raise InputError(where, f"{name}: {error}", key=MODEL_KEYS[0]) from error
    return path if os.path.isdir(path) else None  # False, not an error, for a name that is too long


def _files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The files of a model's folder that loading it may read, sorted."""
    inside = [*folder.iterdir(), *folder.glob("additional_chat_templates/*")]
    return sorted(
        path
        for path in inside
        if path.suffix in suffixes and not path.name.startswith((".", *_TRAINER)) and path.is_file()
    )


# What data a run trains on, as a fingerprint that any machine can take again.
#
# Local files count by their content, objects by size and the store's own checksum (etag, md5 or
# generation), hub data sets by name and revision.

# What of a config says which rows are trained on, besides the files themselves.
DATA_KEYS = ("data", "data_limit", "datasets", "dataset_name", "dataset_config", "dataset_train_split")
_PACKAGED = ("json", "csv", "parquet", "arrow", "text", "xml")  # loaders of ``datasets`` that read files as they are


def data_files(config: Mapping[str, Any], where: object) -> list[dict[str, Any]]:
    """What the config trains on: one ``{source, url, size, sha256 | checksum}`` a file.

    Raises InputError, StoreError as ``find_files``.
    """
    found: list[dict[str, Any]] = []
    for index, source in enumerate(config.get("data") or []):
        for url in find_files(source["source"], where, key := f"data[{index}].source").files:
            found.append({"source": source["source"], **_file_facts(url, where, key)})
    for key in ("dataset_name", "datasets"):
        if config.get(key):
            found += _trl_facts(config[key], where, key)
    return found


def data_sha256(config: Mapping[str, Any], files: list[dict[str, Any]]) -> str:
    """The fingerprint of the data: the files and how the config mixes them."""
    facts = [
        {key: value for key, value in file.items() if key != "url"} | {"name": Path(file["url"]).name} for file in files
    ]
    return fingerprint({"files": facts, "mix": {key: config.get(key) for key in DATA_KEYS}})


def has_local_files(files: Iterable[Mapping[str, Any]]) -> bool:
    """Returns whether any file of ``data_files`` counts by its content."""
    return any("sha256" in file for file in files)


def _trl_facts(named: Any, where: object, key: str) -> list[dict[str, Any]]:
    """Facts of what ``datasets`` (a list of entries) or ``dataset_name`` names."""
    facts: list[dict[str, Any]] = []
    for entry in named if isinstance(named, list) else [{"path": named}]:
        entry = entry if isinstance(entry, Mapping) else {"path": entry}
        name = str(entry.get("path", ""))
        files = _trl_files(name, entry, where, key)
        facts += [{"source": name, **_file_facts(file, where, key)} for file in files]
        if not files:
            facts.append({"source": name, "url": f"hf://{name}"})
    return facts


def _trl_files(name: str, entry: Mapping[str, Any], where: object, key: str) -> list[str]:
    """The files that ``load_dataset`` reads for an entry: below a local folder, or those that it names. Sorted."""
    folder = local_path(name, where, key)
    is_local = os.path.isdir(folder)
    if not is_local and name not in _PACKAGED:
        return []  # a data set of the hub, and its own files
    found = _walk_folder(folder) if is_local else []
    if isinstance(inside := entry.get("data_dir"), str) and not is_local:
        found += _walk_folder(local_path(inside, where, key))
    for text in _texts(entry.get("data_files")):
        if is_remote(text) or text.startswith("hf://"):
            found.append(text)
            continue
        path = local_path(text.removeprefix("file://"), where, key)
        path = folder / path if is_local else path
        found += [str(path)] if path.is_file() else glob.glob(str(path), recursive=True)
    return sorted({file for file in found if is_remote(file) or file.startswith("hf://") or os.path.isfile(file)})


def _walk_folder(folder: Path) -> list[str]:
    return [str(file) for file in folder.rglob("*") if file.is_file() and not file.name.startswith(".")]


def _texts(value: Any) -> list[str]:
    """The file names inside ``data_files``: one text, a list of them, or either for each split."""
    if isinstance(value, Mapping):
        return [text for inner in value.values() for text in _texts(inner)]
    return [str(inner) for inner in value] if isinstance(value, list) else [str(value)] if value else []


def _file_facts(url: str, where: object, key: str) -> dict[str, Any]:
    if url.startswith(("hf://", "http://", "https://")):
        return {"url": url}
    if not is_remote(url):
        try:
            return {"url": url, **file_facts(local_path(url.removeprefix("file://"), where, key))}
        except OSError as error:
            if is_machine_fault(error):
                raise StoreError(f"{where}: {key}: cannot read {url}: {error.strerror or error}") from error
            raise InputError(where, f"cannot read {url}: {error.strerror or error}", key=key) from error
    try:
        fs, path = open_store(url)
        info = fs.info(path)
    except Exception as error:
        raise unreachable(url, where, key, error) from error
    return {"url": url, "size": info.get("size"), "checksum": checksum_of(info)}


def file_facts(path: Path) -> dict[str, Any]:
    """``{size: bytes, sha256: hex}`` of a file, as records name it."""
    with open(path, "rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


# Versions of the libraries that decide which rows a step trains on, and in which order.
#
# A checkpoint holds a position in the data, not the rows. Under another version of one of these libraries the same seed
# may give another order: then a resumed run trains some rows twice and others never. So a commit records the versions,
# and a resume under others is refused like a changed config.

ORDER_LIBRARIES = (
    "datasets",  # shuffles and splits; its shuffle changed between 5.0.1 and 5.2.0
    "numpy",  # draws the permutations of datasets' shuffle
    "torch",  # draws the permutation of each epoch, and the seeds of loader processes
    "accelerate",  # deals batches to the ranks, and skips them at a resume
    "transformers",  # chooses the sampler, and how many batches a resume skips
    "trl",  # tokenizes, truncates and packs: decides what a row is
)
# Recorded for people. peft and wandb never see the order of rows. spotune's own code is recorded with the run (code/).
OTHER_LIBRARIES = ("peft", "spotune")


def installed_versions() -> dict[str, str]:
    """Returns the versions that a commit records, of those libraries that this Python has. Imports none of them."""
    found = {}
    for name in (*ORDER_LIBRARIES, *OTHER_LIBRARIES):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def changed_versions(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Returns ``datasets 5.0.1 -> 5.2.0`` for each library that may have changed the order of rows.

    A library that either side does not name is taken as unchanged: commits of earlier versions do not name numpy. The
    builds of one version (``2.13.0+cpu``, ``2.13.0+cu130``) count as the same.
    """
    return [
        f"{name} {before[name]} -> {after[name]}"
        for name in ORDER_LIBRARIES
        if name in before and name in after and _release(before[name]) != _release(after[name])
    ]


def _release(text: str) -> str:
    return text.partition("+")[0]
