"""Tables as plain text: what people typed, in whatever name, breaks no line and moves no cursor."""

from collections.abc import Sequence


def columns(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Cells padded to their column's widest, two spaces apart; those of ``right`` end where it does."""
    lines = [header, *([plain(cell) for cell in row] for row in rows)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    form = "  ".join(f"{{:{'>' if index in right else '<'}{width}}}" for index, width in enumerate(widths))
    return "\n".join(form.format(*line).rstrip() for line in lines)


def plain(text: str) -> str:
    """One line, of characters that can be seen; others as Python writes them: ``a\\nb``."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def cut(text: str, most: int) -> str:
    """What of a text fits."""
    return text if len(text) <= most else f"{text[: most - 1]}…"
