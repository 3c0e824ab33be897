"""The comparison as a picture that stands alone: a group of bars for each fine-tune, clouds side by side."""

from collections.abc import Sequence
from html import escape

from estimate.compare import Quote, by_cloud
from estimate.tables import NAMES, usd
from spotune.cost.page import number_ticks, placer

_WIDTH, _LEFT, _RIGHT, _BAR, _ROW, _HEAD = 860, 190, 80, 13, 36, 58
# Its own background and colours, so that it reads on a light page and on a dark one; pattern and text beside colour.
_STYLE = (
    "text{font:13px system-ui,'Segoe UI',Roboto,'DejaVu Sans',sans-serif;fill:#1b1c1e}"
    ".title{font-weight:650;font-size:15px}.soft{fill:#5a5d63;font-size:12px}.grid{stroke:#d9d9d4}"
    ".paid{fill:#85888e}.spot{fill:#0072b2}"
)
_KEY = (
    '<rect class="paid" x="16" y="52" width="22" height="13"/><text x="44" y="63">on-demand</text>'
    '<rect class="spot" x="136" y="52" width="22" height="13"/><text x="164" y="63">spot, preemptions included</text>'
)


def picture(groups: Sequence[tuple[str, Sequence[Quote]]]) -> str:
    """(title, quotes) for each fine-tune; every group has its own scale."""
    y, content, said = 84.0, "", []
    for title, found in groups:
        best = by_cloud(found)
        text, height = _group(title, best, y)
        content, y = content + text, y + height
        said.append(f"{title}: " + "; ".join(_words(one) for one in best))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y:g}" width="{_WIDTH}" height="{y:g}" '
        f'role="img" aria-labelledby="analysis-t analysis-d">'
        f'<title id="analysis-t">Dollars for a run, by cloud</title>'
        f'<desc id="analysis-d">{escape(". ".join(said))}.</desc><style>{_STYLE}</style>'
        f'<rect width="{_WIDTH}" height="{y:g}" rx="10" fill="#ffffff" stroke="#d9d9d4"/>'
        f'<text class="title" x="16" y="32">Dollars for a run: the cheapest machine of each cloud</text>'
        f"{_KEY}{content}</svg>\n"
    )


def _group(title: str, best: Sequence[Quote], top: float) -> tuple[str, float]:
    amounts = [usd for one in best for usd in (one.on_demand_usd, one.spot_usd) if usd is not None]
    high = max(amounts, default=1.0)
    x = placer(0, high, _WIDTH - _LEFT - _RIGHT)
    height = _HEAD + _ROW * len(best)
    content = f'<text class="title" x="16" y="{top + 22:g}">{escape(title)}</text>'
    for tick in number_ticks(0, high, 5):
        at = _LEFT + x(tick)
        content += (
            f'<path class="grid" d="M{at:.1f} {top + 42:g}V{top + height - 8:g}"/>'
            f'<text class="soft" x="{at:.1f}" y="{top + 38:g}" text-anchor="middle">${tick:,g}</text>'
        )
    for index, one in enumerate(best):
        y = top + 46 + index * _ROW
        content += f'<text x="{_LEFT - 8}" y="{y + 13:g}" text-anchor="end">{escape(_name(one))}</text>'
        content += f'<text class="soft" x="{_LEFT - 8}" y="{y + 26:g}" text-anchor="end">{escape(one.offer.gpu)}</text>'
        for kind, amount, at in (("paid", one.on_demand_usd, y), ("spot", one.spot_usd, y + _BAR + 1)):
            words = "no price known" if amount is None else f"${usd(amount)}"
            width = 0.0 if amount is None else x(amount)
            content += (
                f'<rect class="{kind}" x="{_LEFT}" y="{at:g}" width="{width:.1f}" height="{_BAR}"/>'
                f'<text class="soft" x="{_LEFT + width + 5:.1f}" y="{at + 11:g}">{words}</text>'
            )
    return content, height


def _name(one: Quote) -> str:
    return NAMES.get(one.offer.cloud, one.offer.cloud)


def _words(one: Quote) -> str:
    paid, spot = (
        f"${usd(amount)}" if amount is not None else "unknown" for amount in (one.on_demand_usd, one.spot_usd)
    )
    return f"{_name(one)} {one.offer.gpu}, on-demand {paid}, spot {spot}"
