"""The comparison as markdown."""

from collections.abc import Iterable, Sequence

from estimate.assumptions import DATA, GENERAL, GPUS, FineTune
from estimate.compare import Quote, by_cloud, by_gpu, fits
from estimate.cost import Work, timing
from estimate.market import Market
from estimate.prices import Row

NAMES = {"aws": "AWS", "gcp": "GCP", "lambda": "Lambda", "nebius": "Nebius", "runpod": "RunPod", "vast": "Vast",
         "verda": "Verda"}  # fmt: skip

READING = """\
A row is the machine on which the run costs least in that cloud, on-demand or spot. On-demand and spot: dollars per hour
in the cheapest place, and which that is; hours: until the run is done, its start included; hours paid: with what
preemptions cost; hours to the end: with the wait for machines too; $, median place: at the median spot price of all
places, not the least; saving: of spot over on-demand; break-even: at so many preemptions per hour spot costs what
on-demand does. –: no such price in the rows (a spot price of 0.00 is unknown, not free). GCP: GPU and host together."""


def cloud_table(found: Sequence[Quote]) -> str:
    head = (
        "cloud|instance type|GPU|on-demand|hours|$|spot|hours paid|hours to the end|$|$, median place|saving|break-even"
    )
    lines: list[list[str]] = []
    for one in by_cloud(found):
        offer, spot = one.offer, one.offer.spot is not None
        lines.append(
            [
                NAMES.get(offer.cloud, offer.cloud),
                f"`{offer.instance}`",
                offer.gpu,
                _where(offer.on_demand, spot=False),
                hours(one.on_demand_h),
                usd(one.on_demand_usd),
                _where(offer.spot, spot=True),
                hours(one.paid_h) if spot else "–",
                hours(one.end_h) if spot else "–",
                usd(one.spot_usd),
                usd(one.median_spot_usd),
                saving(one),
                "–" if one.break_even is None else f"{one.break_even:.1f}/h",
            ]
        )
    return table(head.split("|"), lines)


def gpu_table(found: Sequence[Quote]) -> str:
    head = ["GPU", "hours", "cheapest on-demand", "$", "cheapest spot", "$"]
    lines = []
    for gpu, paid, spot in by_gpu(found):
        known = paid or spot
        lines.append(
            [
                gpu,
                hours(known.on_demand_h) if known else "–",
                _cloud(paid),
                usd(paid.on_demand_usd if paid else None),
                _cloud(spot),
                usd(spot.spot_usd if spot else None),
            ]
        )
    return table(head, lines)


def job_text(job: FineTune, work: Work, market: Market) -> str:
    """The line above a table: what is computed, and on what."""
    times = timing(job, work, GPUS["H100"])  # start and loss are the same on all
    return (
        f"`config/runs/{job.config.name}`, profile prod: {work.tokens / 1e6:,.1f} M tokens, {work.flops:.2e} FLOPs, "
        f"{job.gpus} GPU{'s' * (job.gpus > 1)}. Memory per GPU, as its header estimates it: {work.memory_gb} GB. "
        f"A start takes {times.start_h * 60:.0f} min; a preemption costs {times.lost_h * 60:.0f} min of paid time, and "
        f"there are {market.per_hour:.2f} in a paid hour."
    )


def left_out(job: FineTune, work: Work, rows: Iterable[Row], hostless: Iterable[tuple[str, int]]) -> str:
    offered = {row.gpu for row in rows if row.gpus == job.gpus}
    small = sorted(gpu for gpu in offered if gpu in GPUS and not fits(work, gpu))
    unfit = sorted(gpu for gpu in offered if gpu not in GPUS)
    alone = sorted(gpu for gpu, count in hostless if count == job.gpus and gpu in GPUS and fits(work, gpu))
    reasons = (
        (alone, "on GCP, no price for the host in the rows"),
        (small, "not enough memory"),
        (unfit, "no bf16, or an ARM host"),
    )
    said = [f"{', '.join(gpus)} ({reason})" for gpus, reason in reasons if gpus]
    return f"Left out: {'; '.join(said)}." if said else ""


def assumption_tables(jobs: Sequence[tuple[FineTune, Work, Market]]) -> str:
    lines = [[one.what, f"{one.value:g} {one.unit}", one.source] for one in GENERAL]
    for job, _, _ in jobs:
        lines.append(
            [f"{job.title}: share of the dense bf16 peak", f"{job.utilization * 100:.0f} %", job.utilization_source]
        )
    for name, data in DATA.items():
        lines.append([f"{name}: tokens per row", f"{data.tokens_per_row:,.0f}", data.source])
    for job, _, market in {job.traces: (job, work, market) for job, work, market in jobs}.values():
        where = (
            f"traces `{job.traces}`: {market.zones} zones, {market.ends} ends, "
            f"up {market.availability * 100:.0f} % "
            "of the time; a machine that is held may outlive an end"
        )
        many = "8 GPUs" if job.gpus > 1 else "1 GPU"
        lines.append([f"preemptions per hour held, {many}", f"{market.per_hour:.2f}", where])
        lines.append([f"wait for the next machine, in any zone, {many}", f"{market.wait_h * 60:.0f} min", "the same"])
    assumed = table(["assumed", "value", "source"], lines)
    gpus = [[name, f"{gpu.bf16_tflops:g}", f"{gpu.memory_gb:g}"] for name, gpu in GPUS.items()]
    return f"{assumed}\n\n{table(['GPU', 'bf16 TFLOPS, dense', 'memory, GB'], gpus)}"


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    top, *rest = (f"| {' | '.join(line)} |" for line in (head, *lines))
    return "\n".join([top, "|---" * len(head) + "|", *rest])


def hours(amount: float) -> str:
    return f"{amount:.1f}" if amount >= 10 else f"{amount:.2f}"


def usd(amount: float | None) -> str:
    return "–" if amount is None else f"{amount:,.2f}"


def saving(one: Quote) -> str:
    if one.on_demand_usd is None or one.spot_usd is None:
        return "–"
    return f"{round((1 - one.spot_usd / one.on_demand_usd) * 100)} %"


def _cloud(one: Quote | None) -> str:
    return NAMES.get(one.offer.cloud, one.offer.cloud) if one else "–"


def _where(row: Row | None, spot: bool) -> str:
    price = row and (row.spot if spot else row.on_demand)
    return f"{price:.2f}/h {row.place}" if row and price else "–"
