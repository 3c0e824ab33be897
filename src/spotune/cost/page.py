"""The pictures of a report: where the time went, attempts over time, loss over steps, cost over time."""

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
from spotune.cost.index import COUNTS
from spotune.cost.tables import notes_of

# Axes: round ticks for seconds, dollars and losses.

_TIMES_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400)


def time_ticks(length_s: float, most: int = 6) -> list[float]:
    """Round times from 0 up to ``length_s``."""
    width = length_s / most
    step = next((size for size in _TIMES_S if size >= width), None)
    if step is None or width < 0.5:
        return number_ticks(0.0, length_s, most) if step is not None else _every(_nice(width / 86400) * 86400, length_s)
    return _every(step, length_s)


def number_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers within ``low`` and ``high``."""
    if not high > low:
        return [low]
    step = _nice((high - low) / most)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def placer(low: float, high: float, size: float) -> Callable[[float], float]:
    """Maps ``low``..``high`` (either may be the greater) to 0..``size``; all to the middle where they are the same."""
    return lambda value: (value - low) / (high - low) * size if high != low else size / 2


def tick_text(seconds: float) -> str:
    """``0``, ``30 s``, ``2m``, ``1h 30m``."""
    if seconds == 0:
        return "0"
    if seconds < 60:
        return f"{seconds:g} s"
    left, parts = round(seconds), []
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        amount, left = divmod(left, size)
        if amount:
            parts.append(f"{amount}{unit}")
    return " ".join(parts)


def _nice(width: float) -> float:
    """The next of 1, 2, 5 x 10^n."""
    power = 10.0 ** math.floor(math.log10(width))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= width * (1 - 1e-9))


def _every(step: float, end: float) -> list[float]:
    return [index * step for index in range(int(end / step + 1e-9) + 1)]


# Pieces of pictures. x is given in percent and text keeps its size, so that one picture fits a phone and a desk.
#
# Lines are drawn in an inner picture of 1000 x 1000 that is stretched, their strokes are not.

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


def svg_picture(name: str, text: str, height: float, content: str) -> str:
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


_STRIP, _PLOT = 26.0, 220.0
_LABEL = 0.07  # of the picture's width, on a phone too
Points = list[tuple[float, float]]


def legend(phases: Sequence[str]) -> str:
    """Those of the phases that occur, in their usual order."""
    items = "".join(f"<li>{swatch(phase)}{tables.PHASES[phase][0]}</li>" for phase in phases)
    return f'<ul class="legend">{items}</ul>'


def phases_bar(report: Mapping[str, Any]) -> str:
    """All of the paid time as one bar."""
    shares = [(phase, report["phases"][f"{phase}_s"]) for phase in tables.PHASES]
    shares = [(phase, seconds) for phase, seconds in shares if seconds > 0]
    content, x = "", 0.0
    for phase, seconds in shares:
        width = seconds / report["paid_s"] * 100
        content += bar(phase, x, width, 34, f"{tables.PHASES[phase][0]}: {money.duration(seconds)}")
        x += width
    said = ", ".join(
        f"{tables.PHASES[phase][0]} {money.percent(seconds / report['paid_s'])}" for phase, seconds in shares
    )
    return svg_picture("phases", f"Paid time by phase: {said}", 34, content)


def strips(report: Mapping[str, Any]) -> str:
    """A strip for every attempt on one axis of time, from submission on."""
    began, length_s = _extent(report)
    parts = []
    for index, attempt in enumerate(report["attempts"]):
        start = attempt["started_at"] - began
        content = f'<rect class="edge" x="0" y=".5" width="100%" height="{_STRIP - 1:g}"/>'
        for offset, seconds, phase in attempt["timeline"]:
            hint = f"{tables.PHASES[phase][0]}: {money.duration(seconds)}"
            content += bar(phase, (start + offset) / length_s * 100, seconds / length_s * 100, _STRIP, hint)
        sums = [(phase, attempt["phases"][f"{phase}_s"]) for phase in tables.PHASES]
        said = ", ".join(
            f"{tables.PHASES[name][0]} {money.duration(paid)}" for name, paid in sums if money.is_seen(paid)
        )
        text = f"{_name(attempt)} over time: begins {money.duration(start)} after submission; {said}"
        facts = [tables.market(attempt), money.duration(attempt["paid_s"])]
        facts += [f"steps {tables.steps(attempt)}"] if attempt["last_step"] else []
        label = f"<p><b>{_name(attempt)}</b> · {escape(' · '.join(facts))} · <b>{escape(tables.end(attempt))}</b></p>"
        parts.append(f'<div class="strip">{label}{svg_picture(f"strip{index}", text, _STRIP, content)}</div>')
    axis = time_axis(time_ticks(length_s), length_s, 14)
    return f'{"".join(parts)}<svg class="axis" height="18" aria-hidden="true">{axis}</svg>'


def loss_chart(report: Mapping[str, Any]) -> str:
    """Loss over steps; what counts as one line, what a later attempt did again beside it. Empty without losses."""
    kept, old = _surviving(report["attempts"])
    every = [point for run in (*kept, *old) for point in run]
    lost = sorted({step for attempt in report["attempts"] for step, _ in attempt.get("losses_not_finite") or []})
    if not every:
        return f"<p>{escape(' '.join(tables.losses(report)))}</p>" if lost else ""
    last = max([*lost, *(step for step, _ in every)])
    low, high = min(loss for _, loss in every), max(loss for _, loss in every)
    pad = (high - low) * 0.06 or max(abs(high) * 0.1, 0.1)
    low, high = low - pad, high + pad
    x, y = placer(0, last, SIDE), placer(high, low, SIDE)

    def place(points: Points) -> Points:
        return [(x(step), y(loss)) for step, loss in points]

    lines = "".join(line(place(run), "old") for run in old) + "".join(line(place(run), "main") for run in kept)
    marks, labels, starts = _starts(report["attempts"], last)
    faults = "".join(f'<path class="fault" d="M{x(step):.1f} 0V{SIDE:g}"/>' for step in lost)
    unit = _PLOT / SIDE
    axes = y_axis([(y(tick) * unit, f"{tick:.4g}") for tick in number_ticks(low, high, 4)])
    axes += x_axis([(x(tick) / 10, f"{tick:g}") for tick in number_ticks(0, last, 6)], _PLOT + 18)
    (step, loss), (last_step, last_loss) = (kept or old)[0][0], (kept or old)[-1][-1]
    text = f"Loss over steps: from {loss:.3f} at step {step:g} to {last_loss:.3f} at step {last_step:g}"
    text += "".join(f"; {said}" for said in (*starts, *tables.losses(report)))
    key = f"<li>{stroke('main')}what counts</li>"
    key += f"<li>{stroke('old')}done again by a later attempt</li>" if "band" in marks or old else ""
    key += f"<li>{stroke('mark')}an attempt goes on</li>" if marks else ""
    key += f"<li>{stroke('fault')}not finite: NaN or infinite</li>" if lost else ""
    key += "<li>a gap: no record of these steps</li>" if len(kept) > 1 else ""
    # The bands first: an attempt that begins at step 0 again would cover the axis.
    content = plot(_PLOT, marks) + axes + plot(_PLOT, faults + lines) + labels
    return f'<ul class="legend">{key}</ul>{svg_picture("loss", text, _PLOT + 24, content)}'


def _starts(attempts: Sequence[Mapping[str, Any]], last: float) -> tuple[str, str, list[str]]:
    """Where attempts go on, with a band over the steps that are done again: marks, their labels, and in words."""
    x = placer(0, last, SIDE)
    marks, said = "", []
    labels: list[tuple[float, str]] = []  # step, names
    reached = attempts[0]["last_step"] or 0
    for attempt in attempts[1:]:
        if attempt["first_step"]:
            step, again = attempt["first_step"] - 1, min(reached, attempt["last_step"])
            said.append(f"attempt {attempt['attempt']} goes on from step {step}")
            if step < again:
                width = x(again) - x(step)
                marks += f'<rect class="band" x="{x(step):.1f}" width="{width:.1f}" height="{SIDE:g}"/>'
                said[-1] += f", {again - step} steps again"
            marks += f'<path class="mark" d="M{x(step):.1f} 0V{SIDE:g}"/>'
            if labels and step - labels[-1][0] < last * _LABEL:  # else they would lie on each other
                labels[-1] = (labels[-1][0], f"{labels[-1][1]} #{attempt['attempt']}")
            else:
                labels.append((step, f"#{attempt['attempt']}"))
        reached = max(reached, attempt["last_step"] or 0)
    return marks, "".join(_label(x(step) / 10, names) for step, names in labels), said


def _label(at: float, names: str) -> str:
    """``at`` in percent."""
    anchor, shift = ("end", -5) if at > 90 else ("start", 5)
    return f'<text class="halo" x="{at:.2f}%" dx="{shift}" y="12" text-anchor="{anchor}">{names}</text>'


def cost_chart(report: Mapping[str, Any]) -> str:
    """Dollars over time, and what the same work would have cost on demand. Empty without a price."""
    if not report["cost_usd"]:
        return ""
    began, length_s = _extent(report)
    spent: Points = [(0.0, 0.0)]
    for attempt in report["attempts"]:
        usd, start = attempt["cost_usd"] or 0.0, attempt["started_at"] - began
        spent += [(start, spent[-1][1]), (start + attempt["paid_s"], spent[-1][1] + usd)]
    spent.append((length_s, spent[-1][1]))
    other, plan = report["on_demand"], []
    if other:
        start = report["attempts"][0]["started_at"] - began
        reach = min(length_s, start + other["seconds"])
        top = other["usd"] * (reach - start) / other["seconds"] if other["seconds"] else 0.0
        plan = [(start, 0.0), (reach, top), (length_s, top)]
    high = max(usd for _, usd in (*spent, *plan)) * 1.12
    x, y = placer(0, length_s, SIDE), placer(high, 0, SIDE)
    lines = line([(x(at), y(usd)) for at, usd in plan], "plan")
    lines += line([(x(at), y(usd)) for at, usd in spent], "main")
    unit = _PLOT / SIDE
    axes = y_axis([(y(tick) * unit, money.usd(tick) if tick else "") for tick in number_ticks(0, high, 4)])
    axes += time_axis(time_ticks(length_s), length_s, _PLOT + 18)
    key = f"<li>{stroke('main')}this run: {money.usd(report['cost_usd'])}</li>"
    text = f"Cost over time: this run reaches {money.usd(report['cost_usd'])} after {money.duration(length_s)}"
    if other:
        said = f"{money.usd(other['usd'])}, {money.duration(other['seconds'])} at ${other['price_usd_per_hour']:g}/h"
        key += f"<li>{stroke('plan')}the same work on demand: {escape(said)}</li>"
        text += f"; the same work on demand would have cost {said}"
    picture = svg_picture("cost", text, _PLOT + 24, axes + plot(_PLOT, lines))
    return f'<ul class="legend">{key}</ul>{picture}'


def _surviving(attempts: Sequence[Mapping[str, Any]]) -> tuple[list[Points], list[Points]]:
    """Losses that count, broken where steps have no record; and those that a later attempt did again."""
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
    """When the pictures begin, and how long the time is that they show."""
    began = min(report["submitted_at"], report["attempts"][0]["started_at"])
    ends = [attempt["started_at"] + attempt["paid_s"] for attempt in report["attempts"]]
    return began, max(max(ends) - began, 0.001)


def _name(attempt: Mapping[str, Any]) -> str:
    return f"Attempt {attempt['attempt']}" if attempt["attempt"] else "A machine that never began"


# A report as one self-contained page: no network, no script; whatever a user typed is escaped.

# The tables of a report's page.


def phases(report: Mapping[str, Any], present: Sequence[str]) -> str:
    rows = ""
    for phase in present:
        name, what = tables.PHASES[phase]
        seconds = report["phases"][f"{phase}_s"]
        share = seconds / report["paid_s"]
        drawn = f'<svg height="14" aria-hidden="true">{bar(phase, 0, max(share * 100, 0.4), 14)}</svg>'
        rows += (
            f'<tr><th scope="row">{swatch(phase)} {name}</th><td class="soft what">{what}</td>'
            f'<td class="n">{money.duration(seconds)}</td><td class="n">{money.percent(share)}</td>'
            f'<td class="share">{drawn}</td></tr>'
        )
    waited = money.duration(report["phases"]["queue_s"])
    return (
        f'{phases_bar(report)}<table class="phases">'
        f"<caption>{money.duration(report['paid_s'])} paid; another {waited} "
        'were spent waiting for machines, unpaid.</caption><thead><tr><th scope="col">Phase</th>'
        '<th scope="col" class="what">What</th><th scope="col" class="n">Time</th><th scope="col" class="n">Share</th>'
        f'<th scope="col"><span aria-hidden="true"></span></th></tr></thead><tbody>{rows}</tbody></table>'
    )


def machines(attempts: Sequence[Mapping[str, Any]]) -> str:
    # The money first: on a phone the rest is beyond the screen's edge.
    titles = ("Attempt", "Cost", "Paid", "Steps", "Ended", "Kind", "$/hour", "Machine", "Price from")
    right = (1, 2, 3, 6)
    head = "".join(
        f'<th scope="col"{_right(index in right)}>{title}</th>' for index, title in enumerate(titles)
    )  # fmt: skip
    rows = ""
    for attempt in attempts:
        price = attempt["price_usd_per_hour"]
        cells = [
            money.usd(attempt["cost_usd"]),
            money.duration(attempt["paid_s"]),
            tables.steps(attempt),
            tables.end(attempt),
            tables.market(attempt),
            money.NONE if price is None else f"{price:g}",
            tables.machine(attempt),
            attempt["price_source"],
        ]
        body = "".join(
            f"<td{_right(index in right)}>{escape(cell)}</td>" for index, cell in enumerate(cells[:-1], start=1)
        )
        rows += f'<tr><th scope="row">{attempt["attempt"] or money.NONE}</th>{body}<td>{escape(cells[-1])}</td></tr>'
    return (
        '<div class="wide" role="region" aria-labelledby="machines" tabindex="0"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def lost(preemptions: Sequence[Mapping[str, Any]]) -> str:
    """Empty when there was none."""
    if not preemptions:
        return ""
    titles = ("Attempt", "Cost", "Paid", "Ended", "Provision", "Setup", "Loading", "Restore", "Done again")
    seconds = ("provision_s", "setup_s", "load_s", "restore_s", "replayed_s")
    head = "".join(f'<th scope="col"{_right(index not in (0, 3))}>{title}</th>' for index, title in enumerate(titles))
    rows = ""
    for one in preemptions:
        cells = "".join(f'<td class="n">{money.duration(one[name])}</td>' for name in seconds)
        paid = f'<td class="n">{money.usd(one["cost_usd"])}</td><td class="n">{money.duration(one["paid_s"])}</td>'
        name = f'<th scope="row">{one["attempt"] or money.NONE}</th>'
        rows += f'<tr>{name}{paid}<td class="nowrap">{escape(tables.end(one))}</td>{cells}</tr>'
    return (
        '<div class="wide" role="region" aria-labelledby="lost" tabindex="0"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def data(sources: Sequence[Mapping[str, Any]]) -> str:
    """Empty where no machine has counted yet."""
    if not sources:
        return ""
    titles = ("Source", "Used for", "Rows", "Dropped", "Truncated", "Empty")
    head = "".join(f'<th scope="col"{_right(index > 1)}>{title}</th>' for index, title in enumerate(titles))
    rows = ""
    for one in sources:
        cells = "".join(f'<td class="n">{money.count(one[name])}</td>' for name in COUNTS)
        rows += f'<tr><th scope="row">{escape(one["source"])}</th><td>{escape(tables.use_of(one))}</td>{cells}</tr>'
    return (
        '<div class="wide" role="region" aria-labelledby="data" tabindex="0"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _right(is_right: bool) -> str:
    return ' class="n"' if is_right else ' class="nowrap"'


_OPTION = "--html"
_LONGEST_NAME = 255 - 16  # bytes, what a file system takes, less the mark of a half-written file
_LOST = "What the machine after it spent until it was as far; what is done again counts with its waits and saves."
_ROWS = "Dropped: no token of the row is trained on. Truncated: cut to max_length. Empty: no text after tokenizing."
_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'"/>
<title>{title}</title>
<style>
{style}</style>
</head>
"""


def check_target(name: str) -> Path:
    """The path of ``--html``; raises InputError when no page can be written there."""
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
    """Writes the page whole or not at all; raises InputError when it cannot."""
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
    """The page, as text."""
    style = resources.files("spotune.cost").joinpath("page.css").read_text(encoding="utf-8")
    parts = [_HEAD.format(title=f"Cost of {escape(report['run_id'])}", style=style), "<body>", patterns()]
    parts += [_header(report), "<main>", _figures(report), _notes(report)]
    if report["attempts"]:
        parts += _sections(report)
    else:
        parts.append("<section><h2>No machine yet</h2><p>Nothing was paid so far.</p></section>")
    parts.append(_section("data", "What became of the rows", _ROWS, data(report["data_rows"])))
    parts += ["</main>", _footer(report), "</body></html>"]
    return "\n".join(part for part in parts if part) + "\n"


def _sections(report: Mapping[str, Any]) -> list[str]:
    present = [phase for phase in tables.PHASES if money.is_seen(report["phases"][f"{phase}_s"])]
    attempts = f"{legend(present)}{strips(report)}"
    return [
        _section("time", "Where the paid time went", "", phases(report, present)) if report["paid_s"] else "",
        _section(
            "attempts", "Attempts over time", "From submission on; where a strip is empty, nothing was paid.", attempts
        ),
        _section("losses", "Loss over steps", "One line across all attempts.", loss_chart(report)),
        _section("money", "Cost over time", "", cost_chart(report)),
        _section("lost", "What each lost machine cost", _LOST, lost(report["preemptions"])),
        _section("machines", "Machines", "", machines(report["attempts"])),
    ]


def _section(name: str, title: str, about: str, content: str) -> str:
    if not content:
        return ""
    about = f'<p class="about">{about}</p>' if about else ""
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{title}</h2>{about}{content}</section>'


def _header(report: Mapping[str, Any]) -> str:
    who = escape(report["user"]) + (f" ({escape(report['team'])})" if report["team"] else "")
    state = escape(report["state"])
    facts = [escape(report["config"]), who, f"submitted {_date(report['submitted_at'])}"]
    if report["ended_at"]:
        facts.append(f"ended {_date(report['ended_at'])}")
    return (
        f'<header><h1>{escape(report["run_id"])}<span class="state {state}">{state}</span></h1>'
        f'<p class="soft">{" · ".join(facts)}</p></header>'
    )


def _figures(report: Mapping[str, Any]) -> str:
    saved, base = report["saved_usd"], report["on_demand_usd"]
    share = f", {money.percent(abs(saved) / base)}" if saved is not None and base else ""
    against = f"against {money.usd(base)} on demand{share}" if base is not None else "no on-demand price was frozen"
    again = report["replayed_steps"]
    tone = "" if saved is None else "good" if saved >= 0 else "bad"
    per_million = report["usd_per_million_tokens"]
    tokens = f"{money.count(report['tokens'])} tokens"
    cards = [
        ("Cost", money.usd(report["cost_usd"]), "", f"{money.duration(report['paid_s'])} paid"),
        ("Saved" if saved is None or saved >= 0 else "More than on demand",
         money.usd(None if saved is None else abs(saved)), tone, against),
        ("Goodput", money.percent(report["goodput"]), "", "of the paid time was training that counts"),
        ("Steps", money.count(report["useful_steps"]), "", f"{money.count(again)} done again; {tokens}"),
        ("A million tokens", money.usd(per_million), "", f"at {tokens} trained"),
    ]  # fmt: skip
    body = "".join(
        f'<div><dt>{name}</dt><dd><span class="value {tone}">{value}</span><span class="soft">{escape(more)}</span>'
        "</dd></div>"
        for name, value, tone, more in cards
    )
    return f'<dl class="figures">{body}</dl>'


def _notes(report: Mapping[str, Any]) -> str:
    said = [*tables.preemptions(report), *tables.stalls(report), *tables.gpus(report), *notes_of(report)]
    notes = "".join(f"<li>{escape(note)}</li>" for note in said)
    return f'<ul class="notes" aria-label="Notes">{notes}</ul>' if notes else ""


def _footer(report: Mapping[str, Any]) -> str:
    rows, own = "the engine's own rows", "the machine's own clock"
    clock = (
        rows
        if not report["unreconciled_s"]
        else own
        if report["unreconciled_s"] == report["paid_s"]
        else (f"{rows}, where they are not to be had {own}")
    )
    return (
        f"<footer><p>Paid time follows {clock}, dollars the prices frozen at submission. What is "
        "not known is shown as unknown, never spread over the other phases. On demand: the same useful steps, "
        "undisturbed, at the cheapest frozen on-demand price with these accelerators.</p>"
        f"<p>spotune, {_date(report['reported_at'])}</p></footer>"
    )


def _date(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(at))
