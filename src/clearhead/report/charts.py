"""Chart values drawn with matplotlib: inline SVG that follows the page's colours, PDF and PNG for a paper.

Figures are made object by object on the Agg canvas; no global figure state, no display, no network. An SVG keeps its
text as text and refers to the page's CSS variables for colour, so it reads in light and dark and can be searched.
"""

from __future__ import annotations

import io
import re
from pathlib import Path

from matplotlib.figure import Figure

from clearhead.analysis.sections import BarChart, Chart, LineChart
from clearhead.data.writing import writing
from clearhead.report.drawing.bars import draw_bars, draw_stack
from clearhead.report.drawing.frame import Arms, style
from clearhead.report.drawing.heat import draw_heat
from clearhead.report.drawing.lines import draw_lines
from clearhead.report.palette import PAPER, all_inks


def render(chart: Chart, arms: Arms, folder: Path) -> str:
    """Draw a chart, write `folder/<slug>.pdf` and `.png`, and return the SVG to put into the page."""
    with style():
        figure = draw(chart, arms)
        # The layout is the slow part: solve it once for the three files.
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        folder.mkdir(parents=True, exist_ok=True)
        # No dates in the files: the same results give the same bytes.
        for kind, metadata in (("pdf", {"CreationDate": None}), ("png", {})):
            # To memory first: on a full disk matplotlib's own writers fail with something else.
            drawn = io.BytesIO()
            figure.savefig(drawn, format=kind, facecolor=PAPER.light, metadata=metadata)
            with writing(folder / f"{chart.slug}.{kind}"):
                (folder / f"{chart.slug}.{kind}").write_bytes(drawn.getvalue())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return to_page(buffer.getvalue(), chart.slug, f"{chart.title}. {chart.caption}".strip())


def draw(chart: Chart, arms: Arms) -> Figure:
    """The matplotlib figure of a chart."""
    if isinstance(chart, LineChart):
        return draw_lines(chart, arms)
    if isinstance(chart, BarChart):
        return draw_stack(chart) if chart.stacked else draw_bars(chart, arms)
    return draw_heat(chart)


def to_page(svg: str, slug: str, label: str) -> str:
    """An SVG file as an element of the page: page colours, page font, unique ids, an accessible name, no fixed size."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for ink in all_inks():
        svg = re.sub(re.escape(ink.light), f"var(--{ink.name})", svg, flags=re.IGNORECASE)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    svg = re.sub(r"(font: (?:[\w.]+ )*[\d.]+px) [^;\"]*", r"\1 var(--font)", svg)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{slug}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{slug}-\1)", svg)
    svg = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{slug}-\1"', svg)
    opening, rest = svg.split(">", 1)
    opening = re.sub(r' (?:width|height|xmlns:xlink|xmlns|version)="[^"]*"', "", opening)
    return f'{opening} role="img" aria-label="{_attribute(label)}">{rest.strip()}'


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
