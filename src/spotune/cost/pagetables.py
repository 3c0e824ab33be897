"""The tables of a report's page."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from spotune.cost import charts, svg, words
from spotune.cost.datarows import COUNTS


def phases(report: Mapping[str, Any], present: Sequence[str]) -> str:
    rows = ""
    for phase in present:
        name, what = words.PHASES[phase]
        seconds = report["phases"][f"{phase}_s"]
        share = seconds / report["paid_s"]
        drawn = f'<svg height="14" aria-hidden="true">{svg.bar(phase, 0, max(share * 100, 0.4), 14)}</svg>'
        rows += (
            f'<tr><th scope="row">{svg.swatch(phase)} {name}</th><td class="soft what">{what}</td>'
            f'<td class="n">{words.duration(seconds)}</td><td class="n">{words.percent(share)}</td>'
            f'<td class="share">{drawn}</td></tr>'
        )
    waited = words.duration(report["phases"]["queue_s"])
    return (
        f'{charts.phases_bar(report)}<table class="phases">'
        f"<caption>{words.duration(report['paid_s'])} paid; another {waited} "
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
            words.usd(attempt["cost_usd"]),
            words.duration(attempt["paid_s"]),
            words.steps(attempt),
            words.end(attempt),
            words.market(attempt),
            words.NONE if price is None else f"{price:g}",
            words.machine(attempt),
            attempt["price_source"],
        ]
        body = "".join(
            f"<td{_right(index in right)}>{escape(cell)}</td>" for index, cell in enumerate(cells[:-1], start=1)
        )
        rows += f'<tr><th scope="row">{attempt["attempt"] or words.NONE}</th>{body}<td>{escape(cells[-1])}</td></tr>'
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
        cells = "".join(f'<td class="n">{words.duration(one[name])}</td>' for name in seconds)
        money = f'<td class="n">{words.usd(one["cost_usd"])}</td><td class="n">{words.duration(one["paid_s"])}</td>'
        name = f'<th scope="row">{one["attempt"] or words.NONE}</th>'
        rows += f'<tr>{name}{money}<td class="nowrap">{escape(words.end(one))}</td>{cells}</tr>'
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
        cells = "".join(f'<td class="n">{words.count(one[name])}</td>' for name in COUNTS)
        rows += f'<tr><th scope="row">{escape(one["source"])}</th><td>{escape(words.use_of(one))}</td>{cells}</tr>'
    return (
        '<div class="wide" role="region" aria-labelledby="data" tabindex="0"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _right(is_right: bool) -> str:
    return ' class="n"' if is_right else ' class="nowrap"'
