"""Logarithmic axes with numbers that a reader can take in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator

FEW_TICKS = 6
"""Up to so many distinct x values are ticks themselves."""
LARGE = 1e4
"""From here on the ticks of a logarithmic axis are 1, 2 and 5 times powers of ten."""


def log_axis(axes: Axes, values: list[float]) -> None:
    """Logarithmic in x with plain numbers: the values themselves if they are few, else powers of two."""
    axes.set_xscale("log", base=2)
    ticks: Sequence[float] = values
    if values[0] >= LARGE:
        powers = range(int(np.log10(values[0])), int(np.log10(values[-1])) + 1)
        ticks = [
            tick for p in powers for one in (1, 2, 5) if values[0] <= (tick := one * 10.0**p) <= values[-1]
        ]
    elif len(values) > FEW_TICKS:
        low, high = np.ceil(np.log2(values[0])), np.floor(np.log2(values[-1]))
        ticks = [2.0**power for power in np.arange(low, high + 1, max(1, (high - low) // 5))]
    axes.set_xticks(ticks)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick_text(value)))


def tick_text(value: float) -> str:
    """`512`, `50k`, `2M`, `1e+16`."""
    if LARGE <= value < 1e12:
        return next(
            f"{value / size:g}{unit}" for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if value >= size
        )
    return f"{value:g}"


def log_values(axes: Axes) -> None:
    """Logarithmic in y with plain numbers at even steps: values there span less than a power of ten."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
