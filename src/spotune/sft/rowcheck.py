"""``python -m spotune.sft.rowcheck``: looks at the rows of local data files for ``spotune check``, without torch.

Reads a JSON object from stdin, ``{"config": …, "config_path": …, "most_bytes": …}``, and prints another:
``{"rows": how many it read, "partly": files that it did not read to their end, "error": what does not fit, or ""}``.
"""

import json
import sys
from collections.abc import Mapping
from typing import Any

from spotune.core.data_files import find_files, is_remote, kind_of
from spotune.core.errors import InputError, SpotuneError
from spotune.core.output import protect_output
from spotune.sft.readers import open_bytes
from spotune.sft.sources import Part, Read, Source, one_layout, read_part


def check_rows(config: Mapping[str, Any], config_path: str, most_bytes: int) -> dict[str, Any]:
    """Reads the rows of local ``data:`` files, about ``most_bytes`` in all. Raises InputError for what does not fit."""
    reads: list[Read] = []
    partly: list[str] = []
    text_field = str(config.get("dataset_text_field") or "text")
    for index, entry in enumerate(config.get("data") or []):
        source = Source(entry, config_path, f"data[{index}]", text_field)
        if is_remote(source.url):
            continue
        found: list[Read] = []
        skipped = []
        for url in find_files(source.url, config_path, f"data[{index}].source").files:
            left = most_bytes - sum(read.size for read in [*reads, *found])
            if left <= 0 or _is_large_list(url, left):
                skipped.append(url)
                continue
            read = read_part(Part(source, url, url.removeprefix("file://"), ""), None, left)
            found += [read] if read else []
            skipped += [url] if read and not read.is_whole else []
        if not found and not skipped:
            raise InputError(source.url, "has no rows")
        if not skipped:
            source.held_out(sum(read.rows for read in found))
        reads += found
        partly += skipped
    if reads:
        one_layout(reads)
    return {"rows": sum(read.rows for read in reads), "partly": partly}


def _is_large_list(path: str, most_bytes: int) -> bool:
    """Whether a file is one JSON list, which can only be read whole, and a long one."""
    kind, compression = kind_of(path) or ("", "")
    if kind != "json":
        return False
    with open_bytes(path.removeprefix("file://"), compression) as data:
        head = data.read(most_bytes + 1)
    return head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[") and len(head) > most_bytes


class _WithoutPandas:
    """Hides pandas from this process: pyarrow imports it where it can, in a third of a second, for nothing here."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "pandas":
            raise ModuleNotFoundError(name)


def main() -> None:
    protect_output()
    sys.meta_path.insert(0, _WithoutPandas())
    asked = json.load(sys.stdin)
    try:
        found = {**check_rows(asked["config"], asked["config_path"], asked["most_bytes"]), "error": ""}
    except SpotuneError as error:
        found = {"rows": 0, "partly": [], "error": str(error)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
