"""Price rows of SkyPilot's catalog: one shape for all clouds, and what is not a price left out.

GCP sells a GPU apart from the machine that it sits in: its rows are joined with the host's of the same zone, and left
out where there is none. A spot price of 0, or none, is unknown; it is never free.
"""

import csv
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from spotune.core.errors import InputError

# The hosts that SkyPilot takes (its catalog/gcp_catalog.py, the smallest where there is a choice).
GCP_HOSTS = {
    ("L4", 1): "g2-standard-4", ("L4", 4): "g2-standard-48", ("A100", 1): "a2-highgpu-1g",
    ("A100-80GB", 1): "a2-ultragpu-1g", ("H100", 1): "a3-highgpu-1g", ("H100", 8): "a3-highgpu-8g",
    ("H200", 8): "a3-ultragpu-8g",
}  # fmt: skip
Cells = Mapping[str, str]


@dataclass(frozen=True)
class Row:
    """A machine in a place. Prices in dollars per hour, None where they are not known."""

    cloud: str
    instance: str
    gpu: str
    gpus: int
    place: str
    on_demand: float | None
    spot: float | None


@dataclass(frozen=True)
class Offer:
    """A kind of machine of one cloud: its cheapest rows."""

    cloud: str
    instance: str
    gpu: str
    on_demand: Row | None
    spot: Row | None
    median_spot: float | None  # of all places that have a spot price


def read_rows(catalog: Path) -> tuple[list[Row], set[tuple[str, int]]]:
    """All rows with a GPU and a price, and the (GPU, count) of GCP whose host has none. Raises InputError."""
    folder = catalog / "v8" if (catalog / "v8").is_dir() else catalog
    files = sorted(folder.glob("*/vms*.csv"))
    if not files:
        raise InputError(catalog, "no price rows there", remedy="--catalog DIR: the folder with v8/CLOUD/vms.csv")
    clouds: dict[str, list[Cells]] = {}
    for path in files:
        clouds.setdefault(path.parent.name, []).extend(_cells(path))
    rows, hostless = join_hosts(clouds.pop("gcp", []))
    for cloud, lines in clouds.items():
        rows += [
            _row(cloud, cells, cells["InstanceType"], *_prices(cells)) for cells in lines if cells["AcceleratorName"]
        ]
    return [row for row in rows if row.on_demand or row.spot], hostless


def join_hosts(lines: Iterable[Cells]) -> tuple[list[Row], set[tuple[str, int]]]:
    """GCP's GPUs with their hosts; and those that have no host in any zone."""
    lines = list(lines)
    hosts = {(cells["InstanceType"], _place(cells)): _prices(cells) for cells in lines if not cells["AcceleratorName"]}
    rows, seen = [], set()
    for cells in lines:
        if cells["AcceleratorName"]:
            kind = (cells["AcceleratorName"], int(float(cells["AcceleratorCount"])))
            seen.add(kind)
            host = GCP_HOSTS.get(kind, "")
            if prices := hosts.get((host, _place(cells))):
                on_demand, spot = (_sum(*pair) for pair in zip(_prices(cells), prices, strict=True))
                rows.append(_row("gcp", cells, host, on_demand, spot))
    return rows, seen - {(row.gpu, row.gpus) for row in rows}


def offers(rows: Iterable[Row], gpus: int) -> list[Offer]:
    """Kinds of machines with so many GPUs, in the order of clouds and names."""
    kinds: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row.gpus == gpus:
            kinds.setdefault((row.cloud, row.instance, row.gpu), []).append(row)
    found = []
    for (cloud, instance, gpu), places in sorted(kinds.items()):
        paid = [row for row in places if row.on_demand]
        spot = [row for row in places if row.spot]
        found.append(
            Offer(
                cloud, instance, gpu,
                on_demand=min(paid, key=lambda row: (row.on_demand, row.place), default=None),
                spot=min(spot, key=lambda row: (row.spot, row.place), default=None),
                median_spot=median(row.spot for row in spot if row.spot) if spot else None,
            )
        )  # fmt: skip
    return found


def _cells(path: Path) -> Iterator[Cells]:
    with path.open(encoding="utf-8", newline="") as stream:
        for number, cells in enumerate(csv.DictReader(stream), start=2):
            try:
                _prices(cells)
                float(cells["AcceleratorCount"] or 0)
            except (KeyError, ValueError, TypeError) as error:
                raise InputError(path, f"not a price row: {error}", key=f"line {number}") from error
            yield cells


def _row(cloud: str, cells: Cells, instance: str, on_demand: float | None, spot: float | None) -> Row:
    gpus = int(float(cells["AcceleratorCount"]))
    return Row(cloud, instance, _model(cells, instance), gpus, _place(cells), on_demand, spot)


def _model(cells: Cells, instance: str) -> str:
    """The GPU's name; PCIe and NVL cards of the H100 are slower and are told from what the row says beside it."""
    name = cells["AcceleratorName"].removesuffix("-SXM")
    said = f"{instance} {cells.get('GpuInfo') or ''}".lower()
    return next((f"H100 {kind}" for kind in ("PCIe", "NVL") if name == "H100" and kind.lower() in said), name)


def _prices(cells: Cells) -> tuple[float | None, float | None]:
    on_demand, spot = (float(cells[column] or 0) for column in ("Price", "SpotPrice"))
    return (on_demand if on_demand > 0 else None), (spot if spot > 0 else None)


def _place(cells: Cells) -> str:
    """The zone, with its region where the zone's name does not begin with it."""
    region, zone = cells["Region"], cells.get("AvailabilityZone") or ""
    return zone if zone.startswith(region) else f"{region} {zone}".strip()


def _sum(gpu: float | None, host: float | None) -> float | None:
    return None if gpu is None or host is None else round(gpu + host, 6)
