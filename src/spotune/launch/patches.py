"""Splits a patch of git's into the parts of its files."""

import codecs
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

_START = re.compile(rb"(?m)^diff --git ")
_BODY = re.compile(rb"(?m)^(?:@@ |GIT binary patch$)")


@dataclass(frozen=True)
class Section:
    """What a patch says of one file. ``paths``: as it was called and is called, from the repository's top."""

    data: bytes
    paths: tuple[str, ...]

    @property
    def path(self) -> str:
        return self.paths[-1]

    @property
    def head(self) -> bytes:
        found = _BODY.search(self.data)
        return self.data[: found.start()] if found else self.data

    @property
    def is_binary(self) -> bool:
        return b"\nGIT binary patch\n" in self.data

    @property
    def is_new(self) -> bool:
        return b"\nnew file mode " in self.head

    @property
    def text(self) -> bytes:
        """The lines of the hunks without the mark of what was added, removed or left."""
        body = self.data[len(self.head) :]
        return re.sub(rb"(?m)^[ +-]", b"", body)


def sections(diff: bytes) -> Iterator[Section]:
    """Yields the patch's parts; together they are the patch. A file's own lines never start one: each has a mark."""
    starts = [found.start() for found in _START.finditer(diff)]
    for start, end in pairwise([*starts, len(diff)]):
        data = diff[start:end]
        found = _BODY.search(data)
        yield Section(data, _paths(data[: found.start()] if found else data))


def _paths(head: bytes) -> tuple[str, ...]:
    """The file's names in the head of its part: both, where it was renamed."""
    first, *lines = head.split(b"\n")
    if renamed := [line.split(b" ", 2)[2] for line in lines if line.startswith((b"rename ", b"copy "))]:
        return tuple(map(_unquoted, renamed))
    pair = first.removeprefix(b"diff --git ")
    if pair.startswith(b'"') and (quoted := re.match(rb'"(?:[^"\\]|\\.)*"', pair)):
        return (_unquoted(quoted[0])[2:],)
    return (os.fsdecode(pair[2 : (len(pair) - 1) // 2]),)  # a/NAME b/NAME


def _unquoted(name: bytes) -> str:
    """A name as git writes it: in quotes, with C's escapes, where it has unusual characters."""
    return os.fsdecode(codecs.escape_decode(name[1:-1])[0] if name.startswith(b'"') else name)
