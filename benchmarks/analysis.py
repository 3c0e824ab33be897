"""What three fine-tunes cost on real price rows: on-demand and spot, clouds side by side, assumptions named.

    python benchmarks/analysis.py [--catalog DIR] [--traces DIR] [--svg FILE]

Prints markdown; the assumptions are those of benchmarks/estimate/assumptions.py.
"""

import argparse
import sys
from pathlib import Path

from estimate.assumptions import FINE_TUNES, FineTune
from estimate.compare import Quote, quotes
from estimate.cost import work_of
from estimate.market import read_market
from estimate.picture import picture
from estimate.prices import read_rows
from estimate.tables import READING, assumption_tables, cloud_table, gpu_table, job_text, left_out
from spotune.core.errors import SpotuneError

SHARED = Path(__file__).parents[2] / "shared"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--catalog", type=Path, default=SHARED / "catalog", metavar="DIR", help="SkyPilot's price rows")
    parser.add_argument("--traces", type=Path, default=SHARED / "spot-traces", metavar="DIR", help="of its spot-traces")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="the picture, written there")
    asked = parser.parse_args(arguments)
    try:
        text, groups = analyse(asked.catalog, asked.traces)
    except SpotuneError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(text)
    if asked.svg:
        asked.svg.write_text(picture(groups), encoding="utf-8")
    return 0


def analyse(catalog: Path, traces: Path) -> tuple[str, list[tuple[str, list[Quote]]]]:
    """The markdown, and each fine-tune's quotes. Raises InputError."""
    rows, hostless = read_rows(catalog)
    parts, groups, jobs = [READING], [], []
    for job in FINE_TUNES:
        work, market = work_of(job), read_market(traces, job.traces)
        found = quotes(job, work, market, rows)
        jobs.append((job, work, market))
        groups.append((title(job), found))
        parts += [f"### {job.title}", job_text(job, work, market), cloud_table(found), gpu_table(found)]
        parts += filter(None, [left_out(job, work, rows, hostless)])
    parts += ["### Assumptions", assumption_tables(jobs)]
    return "\n\n".join(parts), groups


def title(job: FineTune) -> str:
    return f"{job.title}, {job.gpus} GPU{'s' * (job.gpus > 1)}"


if __name__ == "__main__":
    sys.exit(main())
