"""Records which code a run uses: the commit, the patch against it, and the files that are left out of the patch."""

import codecs
import hashlib
import json
import os
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory
from typing import Any

from spotune.core.errors import InputError
from spotune.core.store import Store
from spotune.launch.secret_files import MAX_SCAN_BYTES, secret_content, secret_name

MAX_PATCH_BYTES = 10 << 20
MAX_FILE_BYTES = 1 << 20
MAX_NAMES = 1000
# A file that git does not know is code, and new in the patch, if it has one of these suffixes; others are data, logs.
SUFFIXES = (".py", ".pyi", ".sh", ".yaml", ".yml", ".toml", ".cfg", ".ini", ".jinja", ".j2")
# Git's own defaults: the patch is the same, and applies, whatever the user's git settings are.
_DIFF = (
    # what has no flag, or none before git 2.28
    *("-c", "core.abbrev=7", "-c", "core.quotePath=true", "-c", "diff.suppressBlankEmpty=false"),
    *("-c", "diff.relative=false", "-c", "diff.ignoreSubmodules=untracked"),
    *("diff", "--src-prefix=a/", "--dst-prefix=b/", "--submodule=short", "-O/dev/null"),
    *("--diff-algorithm=myers", "--indent-heuristic", "-U3", "--inter-hunk-context=0", "--find-renames", "-l1000"),
    *("--no-ext-diff", "--no-textconv", "--no-color", "--binary", "HEAD"),
)
# The names of `git rev-parse --local-env-vars`, and others that change which files git sees or how it compares them.
_LOCAL = frozenset(
    "GIT_ALTERNATE_OBJECT_DIRECTORIES GIT_CONFIG GIT_CONFIG_PARAMETERS GIT_CONFIG_COUNT GIT_OBJECT_DIRECTORY GIT_DIR"
    " GIT_WORK_TREE GIT_IMPLICIT_WORK_TREE GIT_GRAFT_FILE GIT_INDEX_FILE GIT_NO_REPLACE_OBJECTS GIT_REPLACE_REF_BASE"
    " GIT_PREFIX GIT_SHALLOW_FILE GIT_COMMON_DIR GIT_INTERNAL_SUPER_PREFIX GIT_NAMESPACE GIT_QUARANTINE_PATH"
    " GIT_ATTR_SOURCE GIT_EXTERNAL_DIFF GIT_DIFF_OPTS GIT_LITERAL_PATHSPECS GIT_GLOB_PATHSPECS GIT_NOGLOB_PATHSPECS"
    " GIT_ICASE_PATHSPECS".split()
)
_START = re.compile(rb"(?m)^diff --git ")
_BODY = re.compile(rb"(?m)^(?:@@ |GIT binary patch$)")


@dataclass(frozen=True)
class Section:
    """One file's part of a patch. ``paths``: its old name and its new one, from the top of the repository."""

    head: bytes
    body: bytes
    paths: tuple[str, ...]


def sections(diff: bytes) -> Iterator[Section]:
    """Splits a patch by file. No line of a file can start a part, since each line of a patch has a mark before it."""
    starts = [found.start() for found in _START.finditer(diff)]
    for start, end in pairwise([*starts, len(diff)]):
        found = _BODY.search(diff, start, end)
        head = diff[start : found.start() if found else end]
        yield Section(head, diff[start + len(head) : end], _paths(head))


def _paths(head: bytes) -> tuple[str, ...]:
    """Returns the file's names from the head of its part: two if it was renamed."""
    first, *lines = head.split(b"\n")
    if renamed := [line.split(b" ", 2)[2] for line in lines if line.startswith((b"rename ", b"copy "))]:
        return tuple(map(_unquoted, renamed))
    pair = first.removeprefix(b"diff --git ")
    if pair.startswith(b'"') and (quoted := re.match(rb'"(?:[^"\\]|\\.)*"', pair)):
        return (_unquoted(quoted[0])[2:],)
    return (os.fsdecode(pair[2 : (len(pair) - 1) // 2]),)  # a/NAME b/NAME


def _unquoted(name: bytes) -> str:
    """Reads a name as git writes it: in quotes, with C's escapes, if it has unusual characters."""
    return os.fsdecode(codecs.escape_decode(name[1:-1])[0] if name.startswith(b'"') else name)


@dataclass(frozen=True)
class LeftOut:
    """A file that is left out. ``path``: relative to the folder. ``is_tracked``: git knows the file, and it changed."""

    path: str
    why: str
    is_tracked: bool = True


@dataclass(frozen=True)
class Code:
    """The state of a working tree.

    Attributes:
        commit: empty outside a git repository.
        diff: the patch against the commit; code that git does not know yet is new in it.
        untracked: names of the files that git neither knows nor ignores.
        url: the repository from which a machine fetches the code; empty if the folder is sent.
        refusal: git's message if it does not open the repository.
        left_out: files that are not in ``diff`` because they look like secrets or are too large.
        changed, new: how many files of each kind ``diff`` has.
    """

    commit: str = ""
    branch: str = ""
    diff: bytes = b""
    untracked: tuple[str, ...] = ()
    url: str = ""
    refusal: str = ""
    left_out: tuple[LeftOut, ...] = ()
    changed: int = 0
    new: int = 0

    @property
    def is_kept(self) -> bool:
        """Whether the patch is small enough to be uploaded; of a larger one only its hash is."""
        return len(self.diff) <= MAX_PATCH_BYTES

    def facts(self) -> dict[str, Any]:
        """Returns what ``run.json`` and ``code/commit.json`` record."""
        if not self.commit and not self.url:
            return {}
        return {
            "commit": self.commit,
            **({"url": self.url} if self.url else {}),
            "branch": self.branch,
            "dirty": bool(self.diff or self.untracked or self.left_out),
            "diff_sha256": hashlib.sha256(self.diff).hexdigest() if self.diff else "",
            "diff_bytes": len(self.diff),
            "untracked": list(self.untracked[:MAX_NAMES]),
            "left_out": [left.path for left in self.left_out if left.is_tracked][:MAX_NAMES],
        }

    def lines(self) -> list[tuple[str, str]]:
        """Returns the plan's lines about the code: what is uploaded, and what is left out."""
        if not self.commit:
            return [("code", f"{self.url} at {self.branch or 'its default branch'}")] if self.url else []
        files = [f"{count} {kind}" for count, kind in ((self.changed, "changed"), (self.new, "new")) if count]
        many = "file" if self.changed + self.new == 1 else "files"
        goes = f", {' and '.join(files)} {many}" if files and self.is_kept else ""
        found = [("code", f"commit {self.commit[:12]}{goes}")]
        if more := len(self.untracked) - self.new:
            found.append(("names only", f"{more} new file{'s' if more > 1 else ''}"))
        shown = [f"{left.path} ({left.why})" for left in self.left_out[:10]]
        if rest := len(self.left_out) - len(shown):
            shown.append(f"and {rest} more")
        return [*found, ("left out", ", ".join(shown))] if shown else found

    def notes(self) -> list[str]:
        """Returns the plan's warnings about the code."""
        if self.refusal:
            return [f"the code is not kept with the run, since git does not open its repository: {self.refusal}"]
        if self.is_kept:
            return []
        most = MAX_PATCH_BYTES >> 20
        return [f"uncommitted changes of {len(self.diff) >> 20} MiB are not kept with the run ({most} MiB at most)"]


def read_code(folder: Path) -> Code:
    """Reads the state from git. Without git, without a commit, or if git refuses, the result has no commit.

    Raises InputError if git knows the commit but cannot compare the files with it.
    """
    try:
        commit = _git(folder, "rev-parse", "HEAD").strip().decode()
    except (OSError, subprocess.SubprocessError):
        return Code(refusal=_refusal(folder))
    try:
        names = _git(folder, "ls-files", "-z", "--others", "--exclude-standard").split(b"\0")
        untracked = [os.fsdecode(name) for name in names if name]
        left = {name: why for name in untracked if (why := _why_left_out(folder, name))}
        added = [name for name in untracked if name not in left and _is_code(folder / name)]
        top = Path(os.fsdecode(_git(folder, "rev-parse", "--show-toplevel").rstrip(b"\n")))
        kept, out = _without_secrets(_diff(folder, added), folder, top)
        there = {os.path.realpath(top / one.paths[-1]) for one in kept}
        new = len(there & {os.path.realpath(folder / name) for name in added})
        return Code(
            commit=commit,
            branch=_git(folder, "rev-parse", "--abbrev-ref", "HEAD").strip().decode(),
            diff=b"".join(one.head + one.body for one in kept),
            untracked=tuple(untracked),
            left_out=(*out, *(LeftOut(name, why, is_tracked=False) for name, why in left.items())),
            changed=len(kept) - new,
            new=new,
        )
    except (OSError, subprocess.SubprocessError) as error:
        what = f"git cannot say what differs from the commit: {_message(error)[:200]}"
        raise InputError(folder, what, remedy="git status there says more") from error


def _why_left_out(folder: Path, name: str) -> str:
    """Returns why a file that git does not know is left out; empty if it is uploaded, or is no code anyway."""
    if secret_name(name):
        return "its name"
    path = folder / name
    if not _is_code(path):
        return ""
    if path.stat().st_size > MAX_FILE_BYTES:
        return f"larger than {MAX_FILE_BYTES >> 20} MiB"
    return _why_secret(path.read_bytes(), name)


def _without_secrets(diff: bytes, folder: Path, top: Path) -> tuple[list[Section], list[LeftOut]]:
    """Splits a patch into the parts to upload and the files to leave out. A patch that is too large is not scanned."""
    kept: list[Section] = []
    out: list[LeftOut] = []
    for section in sections(diff):
        why = ""
        if any(map(secret_name, section.paths)):
            why = "its name"
        elif len(diff) <= MAX_PATCH_BYTES:
            why = _why_section(section, folder, top)
        if why:
            out.append(LeftOut(os.path.relpath(top.resolve() / section.paths[-1], folder.resolve()), why))
        else:
            kept.append(section)
    return kept, out


def _why_section(section: Section, folder: Path, top: Path) -> str:
    """Returns why a part is left out: for a secret in the file as it is now, or in what the patch shows."""
    name = section.paths[-1]
    path, before = top / name, re.sub(rb"(?m)^[ +-]", b"", section.body)
    if path.is_file() and not path.is_symlink():
        with open(path, "rb") as file:
            if why := _why_secret(file.read(MAX_SCAN_BYTES), name):
                return why
    if section.body.startswith(b"GIT binary patch\n") and b"\nnew file mode " not in section.head:
        before = _git(folder, "cat-file", "blob", f"HEAD:{section.paths[0]}")
    found = secret_content(before, name)
    return f"its change shows what looks like {found[1]}" if found else ""


def _why_secret(data: bytes, name: str) -> str:
    found = secret_content(data, name)
    return f"line {found[0]} looks like {found[1]}" if found else ""


def _refusal(folder: Path) -> str:
    """Returns git's message if it does not open the folder's repository; empty without a repository or a commit."""
    try:
        _git(folder, "rev-parse", "--git-dir")
    except (OSError, subprocess.SubprocessError) as error:
        here = folder.absolute()
        is_there = any(os.path.exists(above / ".git") for above in (here, *here.parents))  # no error where unreadable
        return _message(error) if is_there else ""
    return ""


def _message(error: OSError | subprocess.SubprocessError) -> str:
    written = getattr(error, "stderr", None) or str(error).encode()
    return " ".join(written.decode(errors="replace").split())


def sent_code(task: Mapping[str, Any], folder: Path) -> Code:
    """Returns the code that a task runs: from ``folder``, or from the task's git reference."""
    workdir = task.get("workdir")
    if not isinstance(workdir, Mapping):
        return read_code(folder)
    ref = str(workdir.get("ref") or "")
    url = re.sub(r"^(https?://)[^/@]*@", r"\1", str(workdir.get("url") or ""))  # no login in a record
    return Code(commit=ref if re.fullmatch("[0-9a-f]{40}", ref) else "", branch=ref, url=url)


def differs(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Returns in words how the code of two snapshots differs; empty if it does not."""
    if then.get("url", "") != now.get("url", ""):
        return f"from {now.get('url') or 'the folder'}, not {then.get('url') or 'the folder'}"
    if then.get("commit") != now.get("commit"):
        return f"commit {str(now.get('commit'))[:12]}, not {str(then.get('commit'))[:12]}"
    if then.get("diff_sha256") != now.get("diff_sha256"):
        return "its uncommitted changes are different"
    left = sorted({*(then.get("left_out") or []), *(now.get("left_out") or [])})
    return f"{', '.join(left[:4])} may have changed: it was left out" if left else ""


def keep_code(code: Code, store: Store, folder: str, written: list[str] | None = None) -> None:
    """Uploads the snapshot to ``folder/…``; adds each key to ``written`` before the upload."""
    files = {"commit.json": json.dumps(facts, indent=1).encode()} if (facts := code.facts()) else {}
    if code.diff and code.is_kept:
        files["diff.patch"] = code.diff
    for name, data in files.items():
        if written is not None:
            written.append(f"{folder}/{name}")
        store.write(f"{folder}/{name}", data)


def _is_code(path: Path) -> bool:
    return path.suffix in SUFFIXES and path.is_file()


def _diff(folder: Path, added: Sequence[str]) -> bytes:
    """Returns the patch against HEAD with the files ``added`` as new ones. Does not change the repository."""
    if not added:
        return _git(folder, *_DIFF)
    index = folder / os.fsdecode(_git(folder, "rev-parse", "--git-path", "index").strip())
    with TemporaryDirectory() as scratch:
        own = f"{scratch}/index"
        if index.exists():
            copyfile(index, own)
        add = ("--literal-pathspecs", "add", "--intent-to-add", "--pathspec-from-file=-", "--pathspec-file-nul")
        _git(folder, *add, index=own, given=b"\0".join(map(os.fsencode, added)))
        return _git(folder, *_DIFF, index=own)


def _git(folder: Path, *arguments: str, index: str = "", given: bytes = b"") -> bytes:
    """Runs git on the folder's repository and returns its output. Ignores a repository that the environment names.

    Git sets such names for its hooks: a run submitted from a hook would record the hook's repository.
    """
    environ = {name: value for name, value in os.environ.items() if name not in _LOCAL}
    environ |= {"GIT_INDEX_FILE": index} if index else {}
    trusted = [part for place in _trusted(os.environ) for part in ("-c", f"safe.directory={place}")]
    command = ["git", *trusted, "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, timeout=120, check=True, input=given, env=environ).stdout


def _trusted(environ: Mapping[str, str]) -> list[str]:
    """Returns the ``safe.directory`` entries of the environment (``GIT_CONFIG_COUNT``): folders of other owners."""
    count = environ.get("GIT_CONFIG_COUNT", "")
    numbers = range(min(int(count), MAX_NAMES)) if re.fullmatch("[0-9]{1,9}", count) else ()
    return [
        environ.get(f"GIT_CONFIG_VALUE_{number}", "")
        for number in numbers
        if environ.get(f"GIT_CONFIG_KEY_{number}", "").lower() == "safe.directory"
    ]


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

    A run uses its config and task, the files that the config names, its data, and the files whose names are in the
    task's commands or in the scripts that these name. Imports of Python modules are found only in those scripts.

    Args:
        files: the data, as ``fingerprint.data_files`` returns it.
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
    texts = [("the task's commands", commands), *((os.path.relpath(path, folder), _text_of(path)) for path in scripts)]
    for left in code.left_out:
        if who := _user(left, paths, texts, folder):
            what = f"is left out of the code snapshot ({left.why}), and {who} uses it"
            remedy = "give the secret by --secret NAME and take it out of the file, or commit the file"
            raise InputError(left.path, what, remedy=remedy)


def _user(left: LeftOut, paths: list[tuple[str, str]], texts: list[tuple[str, str]], folder: Path) -> str:
    """Returns who uses the file, empty for nobody."""
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
    """Yields the texts of a config that may name a file, each with its top key."""
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


def _text_of(path: Path) -> str:
    try:
        is_small = path.is_file() and path.stat().st_size <= MAX_FILE_BYTES
        return path.read_text(errors="replace") if is_small else ""
    except (OSError, ValueError):
        return ""
