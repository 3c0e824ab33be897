"""Which texts may be keys, and names of files in a record: relative, plain, and short enough for every store."""

from collections.abc import Collection

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
