"""Stacked bars of memory by category, as in the charts of `megaprompt plan` and `megaprompt memory`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

COLORS = {
    "parameters": "#0072B2",
    "gathered": "#56B4E9",
    "gradients": "#E69F00",
    "optimizer": "#D55E00",
    "encoders": "#009E73",
    "activations": "#F0E442",
    "buffers": "#CC79A7",
    "runtime": "#999999",
}


def stacked(axes: Any, place: float, sizes: Mapping[str, float], height: float) -> None:
    """A horizontal bar of GB by category."""
    left = 0.0
    for category, color in COLORS.items():
        if size := sizes.get(category, 0.0) / 1e9:
            axes.barh(place, size, height, left=left, color=color, edgecolor="white", linewidth=0.4)
            left += size


def legend(figure: Figure, used: set[str]) -> None:
    """The colours of the categories, below the figure."""
    from matplotlib.patches import Patch

    handles = [Patch(color=color, label=category) for category, color in COLORS.items() if category in used]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8)
