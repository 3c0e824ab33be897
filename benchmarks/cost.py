"""``spotune cost`` over thousands of runs: cold, warm, and whether it grows in a straight line.

    .venv/bin/python benchmarks/cost.py [--runs 1000 2500 5000 10000] [--svg docs/images/cost-index.svg]
    .venv/bin/python benchmarks/cost.py --sky 30000    # in the lab's shell (docs/contributing/lab.md)

Runs of three attempts each, made by made_runs.py in a bucket in a folder. Cold: there is no index yet. Warm: the
median of ``--rounds`` calls with nothing new. Each is a whole process, its output thrown away.

``--sky N`` copies one row of the lab's SkyPilot until its history has N clusters, one for an attempt, times ``sky
cost-report``, and takes them away again.
"""

import argparse
import os
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from html import escape
from pathlib import Path

from made_runs import ATTEMPTS, make_runs
from spotune.cost.page import number_ticks, placer
from startup import SPOTUNE, cpu_seconds

COLD, WARM, BY, FOCUS = "cold", "warm", "warm, --by team", "warm, --format focus"
COMMANDS = {WARM: ["cost"], BY: ["cost", "--by", "team"], FOCUS: ["cost", "--format", "focus"]}
GOALS = {COLD: 30.0, WARM: 0.5}
_WIDTH, _PLOT, _LEFT, _TOP = 860, 220, 70, 64
_STYLE = (
    "text{font:13px system-ui,'Segoe UI',Roboto,'DejaVu Sans',sans-serif;fill:#1b1c1e}"
    ".title{font-weight:650;font-size:15px}.soft{fill:#5a5d63;font-size:12px}.grid{stroke:#d9d9d4}"
    ".line{fill:none;stroke:#0072b2;stroke-width:2}.dot{fill:#0072b2}.straight{stroke:#85888e;stroke-dasharray:5 4}"
)

Row = Mapping[str, tuple[float, float]]  # what was called -> (CPU, wall) seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, nargs="+", default=[1000, 2500, 5000, 10000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--svg", type=Path)
    parser.add_argument("--sky", type=int, metavar="N", help="time `sky cost-report` over N clusters instead")
    asked = parser.parse_args()
    if asked.sky:
        sky_report(asked.sky, asked.rounds)
        return
    print("| runs | attempts | " + " | ".join((COLD, *COMMANDS)) + " |\n|" + "---|" * (3 + len(COMMANDS)))
    rows = {}
    for count in asked.runs:
        rows[count] = measure(count, asked.rounds)
        cells = [f"{wall:.2f} s ({cpu:.2f} s CPU)" for cpu, wall in rows[count].values()]
        print(f"| {count:,} | {count * ATTEMPTS:,} | " + " | ".join(cells) + " |", flush=True)
    if asked.svg:
        asked.svg.write_text(picture(rows))


def measure(count: int, rounds: int) -> Row:
    """A bucket of so many runs is made, read and thrown away."""
    folder = Path(tempfile.mkdtemp(prefix="spotune-runs-"))
    try:
        make_runs(folder / "bucket", count)
        environ = {**os.environ, "SPOTUNE_HOME": str(folder / "home"), "SPOTUNE_BUCKET": f"file://{folder}/bucket"}
        os.sync()  # else the disk is busy with what was made just now
        found = {COLD: cpu_seconds([SPOTUNE, "cost"], environ)}
        os.sync()
        for name, words in COMMANDS.items():
            calls = [cpu_seconds([SPOTUNE, *words], environ) for _ in range(rounds)]
            cpu, wall = (statistics.median(column) for column in zip(*calls, strict=True))
            found[name] = cpu, wall
        return found
    finally:
        shutil.rmtree(folder)


def sky_report(count: int, rounds: int) -> None:
    """``sky cost-report`` with so many clusters in its history, which are one of them again and again."""
    path = Path.home() / ".sky" / "state.db"
    sky = str(Path(sys.executable).with_name("sky"))
    with sqlite3.connect(path, timeout=30) as history:
        columns = [row[1] for row in history.execute("PRAGMA table_info(cluster_history)")]
        one = history.execute(f"SELECT {', '.join(columns)} FROM cluster_history LIMIT 1").fetchone()
        if one is None:
            sys.exit("SkyPilot's history has no cluster to copy: run a job first (tests/lab)")
        places = ", ".join("?" * len(columns))
        copies = ([f"copy-{number}", f"copy-{number}", *one[2:]] for number in range(count))
        assert columns[:2] == ["cluster_hash", "name"]
        history.executemany(f"INSERT INTO cluster_history ({', '.join(columns)}) VALUES ({places})", copies)
    try:
        print("| clusters | `sky cost-report --all` | `sky cost-report --days 30` |\n|---|---|---|")
        cells = []
        for words in (["cost-report", "--all"], ["cost-report", "--days", "30"]):
            calls = []
            for _ in range(rounds):
                began = time.monotonic()
                subprocess.run([sky, *words], check=True, stdout=subprocess.DEVNULL)
                calls.append(time.monotonic() - began)
            cells.append(f"{statistics.median(calls):.1f} s")
        print(f"| {count:,} | " + " | ".join(cells) + " |")
    finally:
        with sqlite3.connect(path, timeout=30) as history:
            history.execute("DELETE FROM cluster_history WHERE cluster_hash LIKE 'copy-%'")


def picture(rows: Mapping[int, Row]) -> str:
    """Wall seconds over the number of runs, a plot each for cold and warm; dashed: in proportion to the largest."""
    content, said = "", []
    height = _TOP + 2 * (_PLOT + 90)
    for index, name in enumerate((COLD, WARM)):
        points = [(count, row[name][1]) for count, row in rows.items()]
        content += _plot(name, points, _TOP + index * (_PLOT + 90))
        said.append(f"{name}: " + ", ".join(f"{count:,} runs {seconds:.2f} s" for count, seconds in points))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}"'
        f' role="img" aria-labelledby="index-t index-d"><title id="index-t">spotune cost by number of runs</title>'
        f'<desc id="index-d">{escape(". ".join(said))}.</desc><style>{_STYLE}</style>'
        f'<rect width="{_WIDTH}" height="{height}" rx="10" fill="#ffffff" stroke="#d9d9d4"/>'
        f'<text class="title" x="16" y="32">spotune cost: wall seconds over the number of runs</text>{content}</svg>\n'
    )


def _plot(name: str, points: list[tuple[int, float]], top: float) -> str:
    most, high = max(count for count, _ in points), max(*(seconds for _, seconds in points), GOALS[name])
    x, y = placer(0, most, _WIDTH - _LEFT - 60), placer(high, 0, _PLOT)
    content = f'<text class="title" x="16" y="{top + 6:g}">{name} (goal at {most:,} runs: {GOALS[name]:g} s)</text>'
    top += 20
    for tick in number_ticks(0, high, 5):
        at = top + y(tick)
        content += f'<path class="grid" d="M{_LEFT} {at:.1f}H{_WIDTH - 60}"/>'
        content += f'<text class="soft" x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{tick:g} s</text>'
    for tick in number_ticks(0, most, 5):
        content += f'<text class="soft" x="{_LEFT + x(tick):.1f}" y="{top + _PLOT + 20:g}" text-anchor="middle">'
        content += f"{tick:,.0f}</text>"
    last = points[-1][1]
    ends = f"M{_LEFT} {top + _PLOT:g}L{_LEFT + x(most):.1f} {top + y(last):.1f}"
    content += f'<path class="straight" d="{ends}"/>'
    places = [(_LEFT + x(count), top + y(seconds)) for count, seconds in points]
    content += f'<path class="line" d="M{"L".join(f"{left:.1f} {down:.1f}" for left, down in places)}"/>'
    for (left, down), (_, seconds) in zip(places, points, strict=True):
        content += f'<circle class="dot" cx="{left:.1f}" cy="{down:.1f}" r="4"/>'
        content += f'<text class="soft" x="{left:.1f}" y="{down - 9:.1f}" text-anchor="middle">{seconds:.2f} s</text>'
    return content


if __name__ == "__main__":
    main()
