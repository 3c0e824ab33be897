"""Pieces of pictures. x is given in percent and text keeps its size, so that one picture fits a phone and a desk.

Lines are drawn in an inner picture of 1000 x 1000 that is stretched, their strokes are not.
"""

from collections.abc import Sequence
from html import escape

from spotune.cost.scale import tick_text

SIDE = 1000.0
# Not by colour alone: these phases have a pattern of the card's colour over theirs.
_PATTERNS = {
    "replayed": '<path d="M-2 2l4-4M0 8l8-8M6 10l4-4" stroke-width="2.4"/>',
    "data_wait": '<path d="M0 4h8" stroke-width="2"/>',
    "provision": '<path d="M4 0v8" stroke-width="2.4"/>',
    "setup": '<path d="M-2 6l4 4M0 0l8 8M6-2l4 4" stroke-width="1.6"/>',
    "stalled": '<path d="M1 1l6 6M7 1l-6 6" stroke-width="1.6"/>',
    "restore": '<path d="M4 0v8M0 4h8" stroke-width="1.4"/>',
    "teardown": '<path d="M0 2h8M0 6h8" stroke-width="1.2"/>',
    "unknown": '<path d="M2 2h0M6 6h0" stroke-width="3.4" stroke-linecap="round"/>',
}


def patterns() -> str:
    """Definitions that the other pieces refer to; once in a page."""
    shapes = "".join(
        f'<pattern id="over-{name}" width="8" height="8" patternUnits="userSpaceOnUse">'
        f'<g fill="none" style="stroke:var(--card)">{shape}</g></pattern>'
        for name, shape in _PATTERNS.items()
    )
    return f'<svg width="0" height="0" aria-hidden="true" style="position:absolute"><defs>{shapes}</defs></svg>'


def bar(phase: str, x: float, width: float, height: float, hint: str = "") -> str:
    """A piece of a strip; x and width in percent."""
    place = f'x="{x:.3f}%" width="{max(width, 0.001):.3f}%" height="{height:g}"'
    title = f"<title>{escape(hint)}</title>" if hint else ""
    over = f'<rect {place} fill="url(#over-{phase})" pointer-events="none"/>' if phase in _PATTERNS else ""
    return f'<rect {place} class="{phase}">{title}</rect>{over}'


def swatch(phase: str) -> str:
    return f'<svg class="swatch" aria-hidden="true">{bar(phase, 0, 100, 16)}</svg>'


def stroke(kind: str) -> str:
    """A line's entry in a legend; a ``mark`` and a ``fault`` stand upright."""
    path = (
        f'<path class="{kind}" d="M14 0v16"/>'
        if kind in ("mark", "fault")
        else f'<path class="line {kind}" d="M2 8h24"/>'
    )
    return f'<svg class="stroke" aria-hidden="true">{path}</svg>'


def picture(name: str, text: str, height: float, content: str) -> str:
    """A picture with a text for those who do not see it."""
    return (
        f'<svg role="img" aria-labelledby="{name}-t {name}-d" height="{height:g}">'
        f'<title id="{name}-t">{escape(text.partition(": ")[0])}</title><desc id="{name}-d">{escape(text)}</desc>'
        f"{content}</svg>"
    )


def plot(height: float, content: str) -> str:
    """The inner, stretched picture that lines are drawn in."""
    return (
        f'<svg x="0" y="0" width="100%" height="{height:g}" viewBox="0 0 {SIDE:g} {SIDE:g}" '
        f'preserveAspectRatio="none" overflow="visible">{content}</svg>'
    )


def line(points: Sequence[tuple[float, float]], kind: str) -> str:
    """A line through points of the stretched picture; a single one is a dot."""
    if not points:
        return ""
    (x, y), *rest = points
    steps = "".join(f"L{x:.1f} {y:.1f}" for x, y in rest) or "h0"
    return f'<path class="line {kind}" d="M{x:.1f} {y:.1f}{steps}"/>'


def x_axis(places: Sequence[tuple[float, str]], y: float) -> str:
    """Labels below a picture: (percent, text)."""
    labels = []
    for index, (x, text) in enumerate(places):
        anchor = "start" if x < 3 else "end" if x > 97 else "middle"
        odd = ' class="odd"' if index % 2 else ""
        labels.append(f'<text x="{x:.2f}%" y="{y:g}" text-anchor="{anchor}"{odd}>{escape(text)}</text>')
    return "".join(labels)


def y_axis(places: Sequence[tuple[float, str]]) -> str:
    """Lines across with their value on them: (pixels from the top, text)."""
    return "".join(
        f'<line class="grid" x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="halo" x="0" y="{y - 4:.1f}">{escape(text)}</text>'
        for y, text in places
    )


def time_axis(ticks: Sequence[float], length_s: float, y: float) -> str:
    return x_axis([(tick / length_s * 100, tick_text(tick)) for tick in ticks], y)
