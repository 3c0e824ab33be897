"""Writes a report as an HTML page with pictures: paid time, attempts over time, loss over steps, cost over time."""

import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from html import escape
from importlib import resources
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from spotune.core import money
from spotune.core.errors import InputError
from spotune.cost import tables

_TIMES_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400)


def number_ticks(low: float, high: float, most: int) -> list[float]:
    """Returns round numbers from ``low`` to ``high``."""
    if not high > low:
        return [low]
    step = _nice((high - low) / most)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def placer(low: float, high: float, size: float) -> Callable[[float], float]:
    """Maps ``low``..``high`` (either may be the greater) to 0..``size``; everything to the middle if they are equal."""
    return lambda value: (value - low) / (high - low) * size if high != low else size / 2


def _nice(width: float) -> float:
    """Returns the next of 1, 2, 5 x 10^n."""
    power = 10.0 ** math.floor(math.log10(width))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= width * (1 - 1e-9))


# Pieces of pictures. x is in percent and text keeps its size, so that one picture fits a phone and a desk. Lines are
# drawn in an inner picture of 1000 x 1000 that is stretched; their strokes are not stretched.

SIDE = 1000.0
_STRIP, _PLOT = 26.0, 220.0  # heights, pixels
_LABEL = 0.07  # of the picture's width, on a phone too
Points = list[tuple[float, float]]
# Colour is not the only difference: these phases have a pattern in the card's colour.
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
    """Returns definitions that the other pieces refer to; once in a page."""
    shapes = "".join(
        f'<pattern id="over-{name}" width="8" height="8" patternUnits="userSpaceOnUse">'
        f'<g fill="none" style="stroke:var(--card)">{shape}</g></pattern>'
        for name, shape in _PATTERNS.items()
    )
    return f'<svg width="0" height="0" aria-hidden="true" style="position:absolute"><defs>{shapes}</defs></svg>'


def bar(phase: str, x: float, width: float, height: float, hint: str = "") -> str:
    """Draws a piece of a strip; x and width in percent."""
    place = f'x="{x:.3f}%" width="{max(width, 0.001):.3f}%" height="{height:g}"'
    title = f"<title>{escape(hint)}</title>" if hint else ""
    over = f'<rect {place} fill="url(#over-{phase})" pointer-events="none"/>' if phase in _PATTERNS else ""
    return f'<rect {place} class="{phase}">{title}</rect>{over}'


def _stroke(kind: str) -> str:
    """Draws a line's entry in a legend; ``mark`` and ``fault`` are upright."""
    upright, level = f'<path class="{kind}" d="M14 0v16"/>', f'<path class="line {kind}" d="M2 8h24"/>'
    return f'<svg class="stroke" aria-hidden="true">{upright if kind in ("mark", "fault") else level}</svg>'


def _picture(name: str, text: str, height: float, content: str) -> str:
    """Draws a picture with a text for people who cannot see it."""
    return (
        f'<svg role="img" aria-labelledby="{name}-t {name}-d" height="{height:g}">'
        f'<title id="{name}-t">{escape(text.partition(": ")[0])}</title><desc id="{name}-d">{escape(text)}</desc>'
        f"{content}</svg>"
    )


def _plot(content: str) -> str:
    """Draws the inner, stretched picture."""
    return (
        f'<svg x="0" y="0" width="100%" height="{_PLOT:g}" viewBox="0 0 {SIDE:g} {SIDE:g}" '
        f'preserveAspectRatio="none" overflow="visible">{content}</svg>'
    )


def _line(points: Points, kind: str) -> str:
    """Draws a line through points of the stretched picture; a single point is a dot."""
    if not points:
        return ""
    (x, y), *rest = points
    steps = "".join(f"L{x:.1f} {y:.1f}" for x, y in rest) or "h0"
    return f'<path class="line {kind}" d="M{x:.1f} {y:.1f}{steps}"/>'


def _x_axis(places: Sequence[tuple[float, str]], y: float) -> str:
    """Draws labels below a picture: (percent, text)."""
    labels = []
    for index, (x, text) in enumerate(places):
        anchor = "start" if x < 3 else "end" if x > 97 else "middle"
        odd = ' class="odd"' if index % 2 else ""
        labels.append(f'<text x="{x:.2f}%" y="{y:g}" text-anchor="{anchor}"{odd}>{escape(text)}</text>')
    return "".join(labels)


def _y_axis(places: Sequence[tuple[float, str]]) -> str:
    """Draws lines across with their value on them: (place in the stretched picture, text)."""
    return "".join(
        f'<line class="grid" x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="halo" x="0" y="{y - 4:.1f}">{escape(text)}</text>'
        for y, text in ((at * _PLOT / SIDE, text) for at, text in places)
    )


def _time_axis(length_s: float, y: float) -> str:
    """Draws about six round times from 0 to ``length_s``: ``0``, ``30 s``, ``2m``, ``1h 30m``."""
    width = length_s / 6
    if width < 0.5:
        ticks = number_ticks(0.0, length_s, 6)
    else:
        step = next((size for size in _TIMES_S if size >= width), _nice(width / 86400) * 86400)
        ticks = [index * step for index in range(int(length_s / step + 1e-9) + 1)]
    texts = ["0" if not tick else f"{tick:g} s" if tick < 60 else money.duration(tick) for tick in ticks]
    return _x_axis([(tick / length_s * 100, text) for tick, text in zip(ticks, texts, strict=True)], y)


def phases_bar(report: Mapping[str, Any]) -> str:
    """Draws the paid time as one bar."""
    content, shares, x = "", [], 0.0
    for phase, (name, _) in tables.PHASES.items():
        if (seconds := report["phases"][f"{phase}_s"]) > 0:
            width = seconds / report["paid_s"] * 100
            content += bar(phase, x, width, 34, f"{name}: {money.duration(seconds)}")
            shares.append(f"{name} {money.percent(seconds / report['paid_s'])}")
            x += width
    return _picture("phases", f"Paid time by phase: {', '.join(shares)}", 34, content)


def strips(report: Mapping[str, Any]) -> str:
    """Draws a strip for each attempt; the time axis begins at submission."""
    began, length_s = _extent(report)
    parts = []
    for index, attempt in enumerate(report["attempts"]):
        start = attempt["started_at"] - began
        content = f'<rect class="edge" x="0" y=".5" width="100%" height="{_STRIP - 1:g}"/>'
        for offset, seconds, phase in attempt["timeline"]:
            hint = f"{tables.PHASES[phase][0]}: {money.duration(seconds)}"
            content += bar(phase, (start + offset) / length_s * 100, seconds / length_s * 100, _STRIP, hint)
        sums = [(name, attempt["phases"][f"{phase}_s"]) for phase, (name, _) in tables.PHASES.items()]
        parts_text = ", ".join(f"{name} {money.duration(paid)}" for name, paid in sums if money.is_seen(paid))
        title = f"Attempt {attempt['attempt']}" if attempt["attempt"] else "A machine that never began"
        text = f"{title} over time: begins {money.duration(start)} after submission; {parts_text}"
        facts = [tables.market(attempt), money.duration(attempt["paid_s"])]
        facts += [f"steps {tables.steps(attempt)}"] if attempt["last_step"] else []
        label = f"<p><b>{title}</b> · {escape(' · '.join(facts))} · <b>{escape(tables.end(attempt))}</b></p>"
        parts.append(f'<div class="strip">{label}{_picture(f"strip{index}", text, _STRIP, content)}</div>')
    return f'{"".join(parts)}<svg class="axis" height="18" aria-hidden="true">{_time_axis(length_s, 14)}</svg>'


def loss_chart(report: Mapping[str, Any]) -> str:
    """Draws the loss over steps; steps that a later attempt did again have their own lines. Empty without losses."""
    kept, old = _surviving(report["attempts"])
    every = [point for points in (*kept, *old) for point in points]
    faulty = sorted({step for attempt in report["attempts"] for step, _ in attempt.get("losses_not_finite") or []})
    if not every:
        return f"<p>{escape(' '.join(tables.losses(report)))}</p>" if faulty else ""
    last = max([*faulty, *(step for step, _ in every)])
    low, high = min(loss for _, loss in every), max(loss for _, loss in every)
    pad = (high - low) * 0.06 or max(abs(high) * 0.1, 0.1)
    low, high = low - pad, high + pad
    x, y = placer(0, last, SIDE), placer(high, low, SIDE)
    lines = ""
    for kind, many in (("old", old), ("main", kept)):
        lines += "".join(_line([(x(step), y(loss)) for step, loss in points], kind) for points in many)
    marks, labels, starts = _starts(report["attempts"], last)
    faults = "".join(f'<path class="fault" d="M{x(step):.1f} 0V{SIDE:g}"/>' for step in faulty)
    axes = _y_axis([(y(tick), f"{tick:.4g}") for tick in number_ticks(low, high, 4)])
    axes += _x_axis([(x(tick) / 10, f"{tick:g}") for tick in number_ticks(0, last, 6)], _PLOT + 18)
    (step, loss), (last_step, last_loss) = (kept or old)[0][0], (kept or old)[-1][-1]
    text = f"Loss over steps: from {loss:.3f} at step {step:g} to {last_loss:.3f} at step {last_step:g}"
    text += "".join(f"; {fact}" for fact in (*starts, *tables.losses(report)))
    key = f"<li>{_stroke('main')}what counts</li>"
    key += f"<li>{_stroke('old')}done again by a later attempt</li>" if "band" in marks or old else ""
    key += f"<li>{_stroke('mark')}an attempt goes on</li>" if marks else ""
    key += f"<li>{_stroke('fault')}not finite: NaN or infinite</li>" if faulty else ""
    key += "<li>a gap: no record of these steps</li>" if len(kept) > 1 else ""
    # The bands first: the band of an attempt that begins at step 0 again would cover the axis.
    content = _plot(marks) + axes + _plot(faults + lines) + labels
    return f'<ul class="legend">{key}</ul>{_picture("loss", text, _PLOT + 24, content)}'


def _starts(attempts: Sequence[Mapping[str, Any]], last: float) -> tuple[str, str, list[str]]:
    """Returns marks where attempts go on, with a band over the steps done again; their labels; and both as texts."""
    x = placer(0, last, SIDE)
    marks, texts = "", []
    labels: list[tuple[float, str]] = []  # step, names
    reached = attempts[0]["last_step"] or 0
    for attempt in attempts[1:]:
        if attempt["first_step"]:
            step, again = attempt["first_step"] - 1, min(reached, attempt["last_step"])
            texts.append(f"attempt {attempt['attempt']} goes on from step {step}")
            if step < again:
                width = x(again) - x(step)
                marks += f'<rect class="band" x="{x(step):.1f}" width="{width:.1f}" height="{SIDE:g}"/>'
                texts[-1] += f", {again - step} steps again"
            marks += f'<path class="mark" d="M{x(step):.1f} 0V{SIDE:g}"/>'
            if labels and step - labels[-1][0] < last * _LABEL:  # two labels would overlap
                labels[-1] = (labels[-1][0], f"{labels[-1][1]} #{attempt['attempt']}")
            else:
                labels.append((step, f"#{attempt['attempt']}"))
        reached = max(reached, attempt["last_step"] or 0)
    drawn = ""
    for step, names in labels:
        at = x(step) / 10  # percent
        anchor, shift = ("end", -5) if at > 90 else ("start", 5)
        drawn += f'<text class="halo" x="{at:.2f}%" dx="{shift}" y="12" text-anchor="{anchor}">{names}</text>'
    return marks, drawn, texts


def cost_chart(report: Mapping[str, Any]) -> str:
    """Draws dollars over time, and what the same work would have cost on demand."""
    began, length_s = _extent(report)
    spent: Points = [(0.0, 0.0)]
    for attempt in report["attempts"]:
        usd, start = attempt["cost_usd"] or 0.0, attempt["started_at"] - began
        spent += [(start, spent[-1][1]), (start + attempt["paid_s"], spent[-1][1] + usd)]
    spent.append((length_s, spent[-1][1]))
    cost = money.usd(report["cost_usd"])
    key = f"<li>{_stroke('main')}this run: {cost}</li>"
    text = f"Cost over time: this run reaches {cost} after {money.duration(length_s)}"
    plan: Points = []
    if other := report["on_demand"]:
        start = report["attempts"][0]["started_at"] - began
        reach = min(length_s, start + other["seconds"])
        top = other["usd"] * (reach - start) / other["seconds"] if other["seconds"] else 0.0
        plan = [(start, 0.0), (reach, top), (length_s, top)]
        price = f"{money.usd(other['usd'])}, {money.duration(other['seconds'])} at ${other['price_usd_per_hour']:g}/h"
        key += f"<li>{_stroke('plan')}the same work on demand: {escape(price)}</li>"
        text += f"; the same work on demand would have cost {price}"
    high = max(usd for _, usd in (*spent, *plan)) * 1.12
    x, y = placer(0, length_s, SIDE), placer(high, 0, SIDE)
    lines = "".join(
        _line([(x(at), y(usd)) for at, usd in points], kind) for kind, points in (("plan", plan), ("main", spent))
    )
    axes = _y_axis([(y(tick), money.usd(tick) if tick else "") for tick in number_ticks(0, high, 4)])
    axes += _time_axis(length_s, _PLOT + 18)
    return f'<ul class="legend">{key}</ul>{_picture("cost", text, _PLOT + 24, axes + _plot(lines))}'


def _surviving(attempts: Sequence[Mapping[str, Any]]) -> tuple[list[Points], list[Points]]:
    """Returns the losses that count, broken where steps have no record, and those that a later attempt did again."""
    kept: Points = []
    old: list[Points] = []
    limit = float("inf")
    for attempt in reversed(attempts):
        points: Points = [(step, loss) for step, loss in attempt["losses"]]
        kept = [point for point in points if point[0] < limit] + kept
        if overtaken := [point for point in points if point[0] >= limit]:
            old.append(overtaken)
        limit = min(limit, attempt["first_step"] or limit)
    gaps = [after[0] - before[0] for before, after in pairwise(kept)]
    usual = median(gaps) if gaps else 0.0
    runs: list[Points] = []
    for index, point in enumerate(kept):
        if not runs or gaps[index - 1] > 3 * usual:
            runs.append([])
        runs[-1].append(point)
    return runs, old


def _extent(report: Mapping[str, Any]) -> tuple[float, float]:
    """Returns when the pictures begin, epoch seconds, and how many seconds they show."""
    began = min(report["submitted_at"], report["attempts"][0]["started_at"])
    ends = [attempt["started_at"] + attempt["paid_s"] for attempt in report["attempts"]]
    return began, max(max(ends) - began, 0.001)


# The page and its file.

_OPTION = "--html"
_LONGEST_NAME = 255 - 16  # bytes: a file system's limit, less the suffix of a half-written file


def check_target(name: str) -> Path:
    """Returns the path of ``--html``. Raises InputError if no page can be written there."""
    path = Path(name)
    if not name or len(os.fsencode(path.name)) > _LONGEST_NAME:
        raise InputError(_OPTION, f"{name[:60]!r} is not the name of a file", remedy=f"{_OPTION} cost.html")
    if path.is_dir():
        raise InputError(_OPTION, f"{name} is a folder", remedy=f"{_OPTION} {path / 'cost.html'}")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise InputError(_OPTION, f"{name}: no such folder", remedy=f"mkdir -p {folder}")
    if not os.access(folder, os.W_OK) or (path.exists() and not path.is_file()):
        raise InputError(_OPTION, f"{name} cannot be written")
    return path


def write_page(path: Path, page: str) -> None:
    """Writes the page whole or not at all. Raises InputError if it cannot."""
    part = ""
    try:
        descriptor, part = tempfile.mkstemp(prefix=f".{path.name[:40]}.", dir=path.absolute().parent)
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="replace") as file:
            file.write(page)
        os.chmod(part, 0o644)
        os.replace(part, path)
    except OSError as error:
        if part:
            Path(part).unlink(missing_ok=True)
        raise InputError(_OPTION, f"{path} cannot be written: {error.strerror}") from error


def page_of(report: Mapping[str, Any]) -> str:
    """Returns the page as text: self-contained, no network, no script, everything that a user typed escaped."""
    from jinja2 import Environment, StrictUndefined  # here: most reports have no page

    page, style = (
        resources.files("spotune.cost").joinpath(name).read_text(encoding="utf-8") for name in ("page.html", "page.css")
    )
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    names = (patterns, bar, phases_bar, strips, loss_chart, cost_chart)
    environment.globals |= {"money": money, "tables": tables} | {one.__name__: one for one in names}
    seconds = {phase: report["phases"][f"{phase}_s"] for phase in tables.PHASES}
    return environment.from_string(page).render(
        report=report,
        style=style,
        phases={phase: paid_s for phase, paid_s in seconds.items() if money.is_seen(paid_s)},
        notes=[*tables.preemptions(report), *tables.stalls(report), *tables.gpus(report), *tables.notes_of(report)],
        date=lambda at: time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(at)),
    )
