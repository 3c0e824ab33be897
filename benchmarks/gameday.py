"""Game day: takes machines away from a run, anywhere, and scores what becomes of it.

    .venv-train/bin/python benchmarks/gameday.py CONFIG [--set k=v]... --schedule SCHEDULE

SCHEDULE: random:N | boundaries | trace:FILE[@SECONDS]

The run is made once undisturbed; then under the schedule, with the same command after every kill. SECONDS: how long
an hour of the trace takes here (60). Exit code 1 when a run was not certified, or not bit-identical.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from random import Random
from tempfile import mkdtemp

from drill.day import Day, play_day
from drill.machine import DrillError
from drill.scorecard import passed, table
from spotune.core.errors import SpotuneError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("--profile", default="")
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--schedule", required=True, metavar="random:N|boundaries|trace:FILE[@SECONDS]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills-per-run", type=int, default=4, metavar="N", help="of a random schedule; default 4")
    parser.add_argument("--bucket", default="file", metavar="URL", help="or file, s3, gs: one of our own on loopback")
    parser.add_argument("--lanes", type=int, default=2, metavar="N", help="runs at the same time; default 2")
    parser.add_argument("--notice", type=float, default=0.0, metavar="S", help="seconds; default 30, a trace's 0")
    parser.add_argument("--plain-trl", action="store_true", help="the same moments for plain `trl sft`, beside it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the scorecards, with a row for every run")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep disks, logs and bucket there")
    asked = parser.parse_args()
    place = (asked.work or Path(mkdtemp(prefix="gameday-"))).absolute()
    try:
        cards = play_day(day_of(asked), Random(asked.seed), place, os.environ)
    except SpotuneError as error:
        print(error, file=sys.stderr)
        if not asked.work:
            shutil.rmtree(place, ignore_errors=True)
        return error.exit_code
    except DrillError as error:
        print(f"game day: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"game day: given up; what there is lies in {place}", file=sys.stderr)
        return 130
    print(table(cards))
    if asked.json:
        asked.json.write_text(json.dumps({"asked": vars(asked), "scorecards": cards}, indent=1, default=str) + "\n")
    if not passed(cards[0]):
        bad = [row for row in cards[0]["per_run"] if not row["bit_identical"]]
        print(f"game day: {len(bad)} runs did not end as if undisturbed: {bad[0]['log']}", file=sys.stderr)
        return 1
    if not asked.work:
        shutil.rmtree(place, ignore_errors=True)
    return 0


def day_of(asked: argparse.Namespace) -> Day:
    """Raises InputError."""
    return Day(
        config=asked.config,
        profile=asked.profile,
        sets=tuple(asked.sets),
        schedule=asked.schedule,
        per_run=asked.kills_per_run,
        bucket=asked.bucket,
        lanes=asked.lanes,
        notice_s=asked.notice,
        with_plain=asked.plain_trl,
    )


if __name__ == "__main__":
    sys.exit(main())
