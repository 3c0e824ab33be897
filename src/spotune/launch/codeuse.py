"""Refuses a run that uses a file which its code snapshot leaves out.

What a run uses: its config and task, the files that the config names, its data, its model's files, and the files whose
names are in the task's commands or in the scripts that these name. What Python imports beyond that nobody can tell
without running it.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from spotune.contracts.errors import InputError
from spotune.launch.code import MAX_FILE_BYTES, Code, LeftOut

_REMEDY = "give the secret by --secret NAME and take it out of the file, or commit the file"


def check_used(
    code: Code,
    config: Mapping[str, Any],
    config_path: str,
    files: Sequence[Mapping[str, Any]],
    task: Mapping[str, Any],
    task_path: Path,
    folder: Path,
) -> None:
    """Raises InputError for the first left-out file that the run uses.

    Args:
        files: the data, as ``fingerprint.data_files`` has it.
        folder: the folder that the run works in; left-out files are relative to it.
    """
    if not code.left_out:
        return
    named = [("the config", config_path), ("the task", str(task_path))]
    named += [(f"the config's {key}", text) for key, text in _texts(config)]
    named += [("its data", str(file["url"]).removeprefix("file://")) for file in files]
    paths = [(who, _real(folder, path)) for who, path in named if "://" not in path and "\n" not in path]
    commands = "\n".join(str(task.get(key) or "") for key in ("setup", "run"))
    commands += "\n" + "\n".join(map(str, (task.get("file_mounts") or {}).values()))
    scripts = [folder / word for word in dict.fromkeys(re.findall(r"[\w./-]+", commands))]
    texts = [("the task's commands", commands), *((_shown(path, folder), _text_of(path)) for path in scripts)]
    for left in code.left_out:
        if who := _user(left, paths, texts, folder):
            what = f"is left out of the code snapshot ({left.why}), and {who} uses it"
            raise InputError(left.path, what, remedy=_REMEDY)


def _user(left: LeftOut, paths: list[tuple[str, str]], texts: list[tuple[str, str]], folder: Path) -> str:
    """Returns what uses the file; empty for nothing."""
    here = _real(folder, left.path)
    for who, path in paths:
        if here == path or (here.startswith(f"{path}{os.sep}") and path != _real(folder, "")):
            return who
    name = re.compile(rf"(?<![\w-]){re.escape(Path(left.path).name)}(?![\w-])")
    module = re.compile(rf"(?m)^\s*(?:from|import)\s+(?:[\w.]+\.)?{re.escape(Path(left.path).stem)}\b")
    is_module = left.path.endswith(".py")
    for who, text in texts:
        if name.search(text) or (is_module and module.search(text)):
            return who
    return ""


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """The texts of a config that may name a file, each with its top key."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _texts(inner, key or str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner, key)


def _real(folder: Path, path: str) -> str:
    return os.path.realpath(folder / os.path.expanduser(path))


def _shown(path: Path, folder: Path) -> str:
    return os.path.relpath(path, folder)


def _text_of(path: Path) -> str:
    try:
        is_small = path.is_file() and path.stat().st_size <= MAX_FILE_BYTES
        return path.read_text(errors="replace") if is_small else ""
    except (OSError, ValueError):
        return ""
