"""A report as one self-contained page: no network, no script; whatever a user typed is escaped."""

import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from spotune.core.errors import InputError
from spotune.cost import charts, words
from spotune.cost.read import COUNTS
from spotune.cost.tables import notes_of

# The tables of a report's page.


def phases(report: Mapping[str, Any], present: Sequence[str]) -> str:
    rows = ""
    for phase in present:
        name, what = words.PHASES[phase]
        seconds = report["phases"][f"{phase}_s"]
        share = seconds / report["paid_s"]
        drawn = f'<svg height="14" aria-hidden="true">{charts.bar(phase, 0, max(share * 100, 0.4), 14)}</svg>'
        rows += (
            f'<tr><th scope="row">{charts.swatch(phase)} {name}</th><td class="soft what">{what}</td>'
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
    parts = [_HEAD.format(title=f"Cost of {escape(report['run_id'])}", style=style), "<body>", charts.patterns()]
    parts += [_header(report), "<main>", _figures(report), _notes(report)]
    if report["attempts"]:
        parts += _sections(report)
    else:
        parts.append("<section><h2>No machine yet</h2><p>Nothing was paid so far.</p></section>")
    parts.append(_section("data", "What became of the rows", _ROWS, data(report["data_rows"])))
    parts += ["</main>", _footer(report), "</body></html>"]
    return "\n".join(part for part in parts if part) + "\n"


def _sections(report: Mapping[str, Any]) -> list[str]:
    present = [phase for phase in words.PHASES if words.is_seen(report["phases"][f"{phase}_s"])]
    attempts = f"{charts.legend(present)}{charts.strips(report)}"
    return [
        _section("time", "Where the paid time went", "", phases(report, present)) if report["paid_s"] else "",
        _section(
            "attempts", "Attempts over time", "From submission on; where a strip is empty, nothing was paid.", attempts
        ),
        _section("losses", "Loss over steps", "One line across all attempts.", charts.loss_chart(report)),
        _section("money", "Cost over time", "", charts.cost_chart(report)),
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
    share = f", {words.percent(abs(saved) / base)}" if saved is not None and base else ""
    against = f"against {words.usd(base)} on demand{share}" if base is not None else "no on-demand price was frozen"
    again = report["replayed_steps"]
    tone = "" if saved is None else "good" if saved >= 0 else "bad"
    per_million = report["usd_per_million_tokens"]
    tokens = f"{words.count(report['tokens'])} tokens"
    cards = [
        ("Cost", words.usd(report["cost_usd"]), "", f"{words.duration(report['paid_s'])} paid"),
        ("Saved" if saved is None or saved >= 0 else "More than on demand",
         words.usd(None if saved is None else abs(saved)), tone, against),
        ("Goodput", words.percent(report["goodput"]), "", "of the paid time was training that counts"),
        ("Steps", words.count(report["useful_steps"]), "", f"{words.count(again)} done again; {tokens}"),
        ("A million tokens", words.usd(per_million), "", f"at {tokens} trained"),
    ]  # fmt: skip
    body = "".join(
        f'<div><dt>{name}</dt><dd><span class="value {tone}">{value}</span><span class="soft">{escape(more)}</span>'
        "</dd></div>"
        for name, value, tone, more in cards
    )
    return f'<dl class="figures">{body}</dl>'


def _notes(report: Mapping[str, Any]) -> str:
    said = [*words.preemptions(report), *words.stalls(report), *words.gpus(report), *notes_of(report)]
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
