"""The cost analysis: rows that are no prices, the arithmetic by hand, and a page that holds what the script prints."""

import math
import re
from pathlib import Path

import pytest

import analysis
from estimate.assumptions import FINE_TUNES, GPUS, Gpu
from estimate.compare import by_cloud, by_gpu, quote, quotes
from estimate.cost import Timing, Work, break_even, on_demand_hours, spot_hours, timing, work_of
from estimate.market import Market, measure, read_market
from estimate.picture import picture
from estimate.prices import Offer, Row, join_hosts, offers, read_rows
from estimate.tables import cloud_table
from spotune.core.errors import InputError
from tests.trainer.architectures import PUBLISHED

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "explanation" / "cost-analysis.md"
CATALOG, TRACES = ROOT.parent / "shared" / "catalog", ROOT.parent / "shared" / "spot-traces"
real = pytest.mark.skipif(
    not (CATALOG.is_dir() and TRACES.is_dir()), reason="the real catalog and traces are not part of this repository"
)
LORA, QLORA, FULL = FINE_TUNES
CALM = Market(zones=1, ends=1, availability=1.0, per_hour=0.5, wait_h=0.5)
HEAD = "InstanceType,AcceleratorName,AcceleratorCount,Price,SpotPrice,Region,GpuInfo"
GCP = "InstanceType,AcceleratorName,AcceleratorCount,Price,SpotPrice,Region,AvailabilityZone"


def write_catalog(folder: Path, **clouds: str) -> Path:
    for cloud, text in clouds.items():
        path = folder / "v8" / cloud / "vms.csv"
        path.parent.mkdir(parents=True)
        path.write_text(text)
    return folder


def row(cloud: str, on_demand: float | None, spot: float | None, gpu: str = "L4", place: str = "here") -> Row:
    return Row(cloud, f"{cloud}-{gpu}", gpu, 1, place, on_demand, spot)


def test_spot_of_nothing_is_unknown_and_never_free(tmp_path: Path) -> None:
    rows, _ = read_rows(write_catalog(tmp_path, vast=f"{HEAD}\na,L4,1,0.60,0.00,x,\n"))
    assert [(one.on_demand, one.spot) for one in rows] == [(0.6, None)]
    (one,) = quotes(LORA, work_of(LORA), CALM, rows)
    assert one.spot_usd is None
    assert one.least_usd == one.on_demand_usd
    assert cloud_table([one]).splitlines()[2].endswith("| – | – | – | – | – | – | – |")


def test_empty_cells_are_no_prices(tmp_path: Path) -> None:
    rows, _ = read_rows(
        write_catalog(tmp_path, verda=f"{HEAD}\na,L4,1,,0.2,x,\nb,L4,1,0.9,,x,\nc,L4,1,,,x,\nd,,,1,1,x,\n")
    )
    assert [(one.instance, one.on_demand, one.spot) for one in rows] == [("a", None, 0.2), ("b", 0.9, None)]


def test_a_row_that_is_none_is_named(tmp_path: Path) -> None:
    catalog = write_catalog(tmp_path, verda=f"{HEAD}\na,L4,1,0.9,0.2,x,\nb,L4,1,cheap,0.2,x,\n")
    with pytest.raises(InputError, match=r"verda/vms.csv: line 3: not a price row"):
        read_rows(catalog)


def test_gcp_gpus_come_with_their_host_or_not_at_all() -> None:
    lines = [
        "g2-standard-4,,,0.15,0.05,r,r-a",
        ",L4,1,0.56,0.22,r,r-a",
        ",L4,1,0.56,0.22,r,r-b",  # no host there
        ",A100,8,12.0,9.0,r,r-a",  # no host anywhere
    ]
    rows, hostless = join_hosts(dict(zip(GCP.split(","), line.split(","), strict=True)) for line in lines)
    assert [(one.instance, one.place, one.on_demand, one.spot) for one in rows] == [
        ("g2-standard-4", "r-a", 0.71, 0.27)
    ]
    assert hostless == {("A100", 8)}


def test_cheapest_rows_and_the_median_of_places() -> None:
    rows = [row("aws", 1.0, 0.5, place="a"), row("aws", 0.8, 0.6, place="b"), row("aws", 1.0, 1.2, place="c")]
    (offer,) = offers(rows, 1)
    assert offer.on_demand
    assert offer.spot
    assert (offer.on_demand.place, offer.spot.place, offer.median_spot) == ("b", "a", 0.6)
    assert offers(rows, 8) == []


def test_pcie_h100_is_told_from_sxm(tmp_path: Path) -> None:
    text = f"{HEAD}\nx,H100,1,1,1,r,{{'Name': 'H100 PCIe'}}\nx,H100-SXM,1,1,1,r,\n1x-H100_NVL,H100,1,1,1,r,\n"
    rows, _ = read_rows(write_catalog(tmp_path, runpod=text))
    assert [one.gpu for one in rows] == ["H100 PCIe", "H100", "H100 NVL"]


def test_hours_and_dollars_by_hand() -> None:
    """6.048e16 FLOPs at 8.4e12 a second are 7,200 s; 600 s + 1.19 GB at 0.5 GB/s to start, and so on."""
    times = timing(LORA, Work(tokens=1, row_length=1, flops=6.048e16, memory_gb=8.91), Gpu(28, 24))
    assert times.useful_h == pytest.approx(2.0)
    assert times.start_h == pytest.approx(602.38 / 3600)
    assert times.lost_h == pytest.approx((602.38 + 2 * 0.242 + 150) / 3600)
    machine = row("aws", 1.0, 0.4)
    one = quote(Offer("aws", "x", "L4", machine, machine, 0.5), Timing(2.0, 0.1, 0.2), CALM)
    assert one.on_demand_usd == pytest.approx(2.1)
    assert one.paid_h == pytest.approx(2.1 / (1 - 0.5 * 0.2))  # 2.333 h, 1.167 preemptions
    assert one.paid_h == pytest.approx(2.1 + 0.5 * one.paid_h * 0.2)
    assert one.spot_usd == pytest.approx(0.4 * one.paid_h)
    assert one.median_spot_usd == pytest.approx(0.5 * one.paid_h)
    assert one.end_h == pytest.approx(one.paid_h + 0.5 * one.paid_h * 0.5)


def test_at_break_even_both_cost_the_same() -> None:
    times = Timing(useful_h=3.0, start_h=0.2, lost_h=0.3)
    rate = break_even(times, on_demand=2.0, spot=0.5)
    assert rate == pytest.approx(2.5)
    assert 0.5 * spot_hours(times, rate) == pytest.approx(2.0 * on_demand_hours(times))
    assert break_even(times, on_demand=2.0, spot=2.0) == 0
    assert break_even(times, on_demand=2.0, spot=3.0) == 0
    assert spot_hours(times, 1 / 0.3) == math.inf


def test_a_market_of_two_zones_by_hand() -> None:
    """An hour a tick. Zone 1 ends twice: once zone 2 has machines, once nobody has for two hours."""
    market = measure([[(3600.0, [1, 0, 0, 1, 0, 0, 1]), (3600.0, [0, 1, 1, 0, 0, 0, 0])]])
    # Ends: zone 1 at 1 (wait 0) and 4 (wait 2), zone 2 at 3 (wait 0); 5 zone-hours up of 14.
    assert market == Market(zones=2, ends=3, availability=5 / 14, per_hour=3 / 5, wait_h=2 / 3)


def test_work_is_what_configs_and_models_say() -> None:
    """Row lengths and models beside PUBLISHED; tokens by hand for the one data set that has no weight."""
    for job in FINE_TUNES:
        text = job.config.read_text()
        name = re.search(r"(?m)^model_name_or_path: (.*)$", text)
        assert name
        shape = PUBLISHED[name.group(1)].shape
        assert job.layers == shape["num_hidden_layers"]
        assert job.attention_width == shape["num_attention_heads"] * shape["head_dim"]
        assert job.parameters == pytest.approx(PUBLISHED[name.group(1)].promised, rel=0.01)
    work = work_of(QLORA)
    assert (work.row_length, work.memory_gb) == (4096, 8.45)
    assert work.tokens == pytest.approx((207_865 - 400) * 1_397_058_554 / 207_865 / 5)
    per_token = 6 * 8190.7e6 + 6 * 43.6e6 + 16 * 36 * 4096 * 4096  # 2 forward, 2 back, 2 again; no weights' gradients
    assert work.flops == pytest.approx(work.tokens * per_token)
    assert work_of(FULL).flops / work_of(FULL).tokens == pytest.approx(8 * 8190.7e6 + 16 * 36 * 4096 * 8192)
    assert work_of(LORA).flops / work_of(LORA).tokens == pytest.approx(4 * 596e6 + 6 * 10.1e6 + 12 * 28 * 2048 * 4096)


@pytest.mark.parametrize(
    ("share", "parameters", "layers", "width", "seconds"),
    [(0.38, 7.72e9, 32, 4096, 7.0), (0.39, 1.84e9, 24, 2048, 1.7)],
)
def test_share_of_the_peak_from_published_speeds(
    share: float, parameters: float, layers: int, width: int, seconds: float
) -> None:
    """Qwen's README: 8 rows of 2048 tokens on an A100 (312 TFLOPS), activations computed again."""
    flops = 8 * 2048 * (6 * parameters + 16 * layers * width * 2048)
    assert flops / seconds / 312e12 == pytest.approx(share, abs=0.005)


def test_headroom_picks_the_gpus_that_the_configs_name() -> None:
    rows = [Row("aws", gpu, gpu, job.gpus, "here", 1.0, 0.5) for job in FINE_TUNES[1:] for gpu in GPUS]
    fitting = [{one.offer.gpu for one in quotes(job, work_of(job), CALM, rows)} for job in (QLORA, FULL)]
    assert {"L4", "A10G"} <= fitting[0]
    assert {"H100", "A100-80GB"} <= fitting[1]
    assert not {"A100", "L4"} & fitting[1]


def test_clouds_and_gpus_in_order() -> None:
    rows = [row("aws", 1.0, 0.5), row("gcp", 0.9, 0.3), row("vast", 0.2, None), row("aws", 9.0, 8.0, "H100")]
    found = quotes(LORA, work_of(LORA), CALM, rows)
    assert [one.offer.cloud for one in by_cloud(found)] == ["vast", "gcp", "aws"]
    slow, fast = by_gpu(found)
    assert (slow[0], slow[1] and slow[1].offer.cloud, slow[2] and slow[2].offer.cloud) == ("L4", "vast", "gcp")
    assert fast[0] == "H100"


def test_picture_says_in_words_what_it_shows() -> None:
    found = quotes(LORA, work_of(LORA), CALM, [row("aws", 1.0, 0.5), row("vast", 0.9, None)])
    text = picture([("LoRA & more", found)])
    assert 'role="img"' in text
    assert re.search(r"<desc[^>]*>LoRA &amp; more: .*Vast L4, on-demand \$[\d.]+, spot unknown", text)
    assert text.count('class="paid"') == 3  # two bars and the key


def test_a_missing_folder_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert analysis.main(["--catalog", str(tmp_path)]) == 2
    assert (
        capsys.readouterr().err
        == f"{tmp_path}: no price rows there (--catalog DIR: the folder with v8/CLOUD/vms.csv)\n"
    )
    with pytest.raises(InputError, match="--traces DIR"):
        read_market(tmp_path, "*.json")


@real
def test_the_page_holds_what_the_script_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    svg = tmp_path / "analysis.svg"
    assert analysis.main(["--svg", str(svg)]) == 0
    remedy = "python benchmarks/analysis.py --svg docs/images/analysis.svg"
    assert capsys.readouterr().out.strip() in PAGE.read_text(), remedy
    assert svg.read_text() == (ROOT / "docs" / "images" / "analysis.svg").read_text(), remedy


@real
def test_the_page_names_the_commits_of_the_rows() -> None:
    said = re.findall(r"(?m)^\| (\w+)/vms.csv.*\| ([0-9a-f]{6,})", (CATALOG / "README.md").read_text())
    assert len(said) == 7
    assert [pair for pair in said if pair[1] not in PAGE.read_text()] == []
