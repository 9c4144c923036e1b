"""Bars of many arms: the colours begin anew with the ninth, and it must not look like the first."""

from matplotlib.patches import Patch

from clearhead.analysis.sections import BarChart, BarSeries
from clearhead.report.drawing.bars import draw_bars
from clearhead.report.palette import ARMS, arm_inks


def test_the_ninth_arm_does_not_look_like_the_first() -> None:
    names = [f"arm {i}" for i in range(len(ARMS) + 2)]
    series = [BarSeries(name, [0.2, 0.3], arm=name) for name in names]
    figure = draw_bars(BarChart("slug", "title", "share", ["answer", "noise"], series), arm_inks(names))
    (axes,) = figure.axes
    bars = [container.patches[0] for container in axes.containers]
    looks = {(bar.get_facecolor(), bar.get_hatch()) for bar in bars}
    assert len(bars) == len(looks) == len(names)
    (legend,) = figure.legends
    patches = [handle for handle in legend.legend_handles if isinstance(handle, Patch)]
    assert [(one.get_facecolor(), one.get_hatch()) for one in patches] == [
        (bar.get_facecolor(), bar.get_hatch()) for bar in bars
    ]
