"""The pictures of a report: where the time went, attempts over time, loss over steps, cost over time."""

from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from statistics import median
from typing import Any

from spotune.cost import svg, words
from spotune.cost.scale import number_ticks, placer, time_ticks

_STRIP, _PLOT = 26.0, 220.0
_LABEL = 0.07  # of the picture's width, on a phone too
Points = list[tuple[float, float]]


def legend(phases: Sequence[str]) -> str:
    """Those of the phases that occur, in their usual order."""
    items = "".join(f"<li>{svg.swatch(phase)}{words.PHASES[phase][0]}</li>" for phase in phases)
    return f'<ul class="legend">{items}</ul>'


def phases_bar(report: Mapping[str, Any]) -> str:
    """All of the paid time as one bar."""
    shares = [(phase, report["phases"][f"{phase}_s"]) for phase in words.PHASES]
    shares = [(phase, seconds) for phase, seconds in shares if seconds > 0]
    content, x = "", 0.0
    for phase, seconds in shares:
        width = seconds / report["paid_s"] * 100
        content += svg.bar(phase, x, width, 34, f"{words.PHASES[phase][0]}: {words.duration(seconds)}")
        x += width
    said = ", ".join(
        f"{words.PHASES[phase][0]} {words.percent(seconds / report['paid_s'])}" for phase, seconds in shares
    )
    return svg.picture("phases", f"Paid time by phase: {said}", 34, content)


def strips(report: Mapping[str, Any]) -> str:
    """A strip for every attempt on one axis of time, from submission on."""
    began, length_s = _extent(report)
    parts = []
    for index, attempt in enumerate(report["attempts"]):
        start = attempt["started_at"] - began
        content = f'<rect class="edge" x="0" y=".5" width="100%" height="{_STRIP - 1:g}"/>'
        for offset, seconds, phase in attempt["timeline"]:
            hint = f"{words.PHASES[phase][0]}: {words.duration(seconds)}"
            content += svg.bar(phase, (start + offset) / length_s * 100, seconds / length_s * 100, _STRIP, hint)
        sums = [(phase, attempt["phases"][f"{phase}_s"]) for phase in words.PHASES]
        said = ", ".join(
            f"{words.PHASES[name][0]} {words.duration(paid)}" for name, paid in sums if words.is_seen(paid)
        )
        text = f"{_name(attempt)} over time: begins {words.duration(start)} after submission; {said}"
        facts = [words.market(attempt), words.duration(attempt["paid_s"])]
        facts += [f"steps {words.steps(attempt)}"] if attempt["last_step"] else []
        label = f"<p><b>{_name(attempt)}</b> · {escape(' · '.join(facts))} · <b>{escape(words.end(attempt))}</b></p>"
        parts.append(f'<div class="strip">{label}{svg.picture(f"strip{index}", text, _STRIP, content)}</div>')
    axis = svg.time_axis(time_ticks(length_s), length_s, 14)
    return f'{"".join(parts)}<svg class="axis" height="18" aria-hidden="true">{axis}</svg>'


def loss_chart(report: Mapping[str, Any]) -> str:
    """Loss over steps; what counts as one line, what a later attempt did again beside it. Empty without losses."""
    kept, old = _surviving(report["attempts"])
    every = [point for run in (*kept, *old) for point in run]
    lost = sorted({step for attempt in report["attempts"] for step, _ in attempt.get("losses_not_finite") or []})
    if not every:
        return f"<p>{escape(' '.join(words.losses(report)))}</p>" if lost else ""
    last = max([*lost, *(step for step, _ in every)])
    low, high = min(loss for _, loss in every), max(loss for _, loss in every)
    pad = (high - low) * 0.06 or max(abs(high) * 0.1, 0.1)
    low, high = low - pad, high + pad
    x, y = placer(0, last, svg.SIDE), placer(high, low, svg.SIDE)

    def place(points: Points) -> Points:
        return [(x(step), y(loss)) for step, loss in points]

    lines = "".join(svg.line(place(run), "old") for run in old) + "".join(svg.line(place(run), "main") for run in kept)
    marks, labels, starts = _starts(report["attempts"], last)
    faults = "".join(f'<path class="fault" d="M{x(step):.1f} 0V{svg.SIDE:g}"/>' for step in lost)
    unit = _PLOT / svg.SIDE
    axes = svg.y_axis([(y(tick) * unit, f"{tick:.4g}") for tick in number_ticks(low, high, 4)])
    axes += svg.x_axis([(x(tick) / 10, f"{tick:g}") for tick in number_ticks(0, last, 6)], _PLOT + 18)
    (step, loss), (last_step, last_loss) = (kept or old)[0][0], (kept or old)[-1][-1]
    text = f"Loss over steps: from {loss:.3f} at step {step:g} to {last_loss:.3f} at step {last_step:g}"
    text += "".join(f"; {said}" for said in (*starts, *words.losses(report)))
    key = f"<li>{svg.stroke('main')}what counts</li>"
    key += f"<li>{svg.stroke('old')}done again by a later attempt</li>" if "band" in marks or old else ""
    key += f"<li>{svg.stroke('mark')}an attempt goes on</li>" if marks else ""
    key += f"<li>{svg.stroke('fault')}not finite: NaN or infinite</li>" if lost else ""
    key += "<li>a gap: no record of these steps</li>" if len(kept) > 1 else ""
    # The bands first: an attempt that begins at step 0 again would cover the axis.
    content = svg.plot(_PLOT, marks) + axes + svg.plot(_PLOT, faults + lines) + labels
    return f'<ul class="legend">{key}</ul>{svg.picture("loss", text, _PLOT + 24, content)}'


def _starts(attempts: Sequence[Mapping[str, Any]], last: float) -> tuple[str, str, list[str]]:
    """Where attempts go on, with a band over the steps that are done again: marks, their labels, and in words."""
    x = placer(0, last, svg.SIDE)
    marks, said = "", []
    labels: list[tuple[float, str]] = []  # step, names
    reached = attempts[0]["last_step"] or 0
    for attempt in attempts[1:]:
        if attempt["first_step"]:
            step, again = attempt["first_step"] - 1, min(reached, attempt["last_step"])
            said.append(f"attempt {attempt['attempt']} goes on from step {step}")
            if step < again:
                width = x(again) - x(step)
                marks += f'<rect class="band" x="{x(step):.1f}" width="{width:.1f}" height="{svg.SIDE:g}"/>'
                said[-1] += f", {again - step} steps again"
            marks += f'<path class="mark" d="M{x(step):.1f} 0V{svg.SIDE:g}"/>'
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
    x, y = placer(0, length_s, svg.SIDE), placer(high, 0, svg.SIDE)
    lines = svg.line([(x(at), y(usd)) for at, usd in plan], "plan")
    lines += svg.line([(x(at), y(usd)) for at, usd in spent], "main")
    unit = _PLOT / svg.SIDE
    axes = svg.y_axis([(y(tick) * unit, words.usd(tick) if tick else "") for tick in number_ticks(0, high, 4)])
    axes += svg.time_axis(time_ticks(length_s), length_s, _PLOT + 18)
    key = f"<li>{svg.stroke('main')}this run: {words.usd(report['cost_usd'])}</li>"
    text = f"Cost over time: this run reaches {words.usd(report['cost_usd'])} after {words.duration(length_s)}"
    if other:
        said = f"{words.usd(other['usd'])}, {words.duration(other['seconds'])} at ${other['price_usd_per_hour']:g}/h"
        key += f"<li>{svg.stroke('plan')}the same work on demand: {escape(said)}</li>"
        text += f"; the same work on demand would have cost {said}"
    picture = svg.picture("cost", text, _PLOT + 24, axes + svg.plot(_PLOT, lines))
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
