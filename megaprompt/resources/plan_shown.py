"""Plans as tables, as JSON, and as a chart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table
from rich.text import Text

from megaprompt.config import PlanConfig
from megaprompt.resources.bars import legend, stacked
from megaprompt.resources.plan import Plan, advice, gigabytes
from megaprompt.resources.predict import CATEGORIES, Place


def tables(config: PlanConfig, found: Sequence[Plan]) -> list[Table]:
    """All configurations in a row each, and the categories of the first one."""
    where = (
        f"{config.nodes} node(s) with {config.gpus} GPU(s) of {config.gpu_memory:g} GB"
        if config.gpus
        else (f"{config.nodes} node(s) without GPU")
    )
    title = f"{config.method} of {config.backbone} on {where} and {config.host_memory:g} GB; GB per rank"
    overview = Table(title=Text(title))
    overview.add_column("configuration", no_wrap=True)
    for column in ("GPU", "host", "NVMe", "network", "PCIe", "disk", "s/pass ≥"):
        overview.add_column(column, justify="right")
    overview.add_column("verdict")
    for plan in found:
        cells = [gigabytes(plan.total(place)) for place in ("device", "host", "nvme")]
        cells += [gigabytes(plan.traffic[way]) for way in ("network", "pcie", "disk")]
        name = f"{Path(plan.name).name} ({plan.dtype})"
        overview.add_row(name, *cells, f"{plan.seconds:.2g}", "fits" if plan.fits else "too large")
    detail = Table(title=Text(f"{Path(found[0].name).stem}: GB per rank"), min_width=40)
    detail.add_column("category")
    for column in ("GPU", "host", "NVMe"):
        detail.add_column(column, justify="right")
    for category in (*CATEGORIES, "runtime"):
        sizes = [found[0].bytes[place].get(category, 0.0) for place in ("device", "host", "nvme")]
        if any(sizes):
            detail.add_row(category, *(f"{size / 1e9:.2f}" if size else "" for size in sizes))
    return [overview, detail]


def as_json(config: PlanConfig, found: Sequence[Plan]) -> dict[str, Any]:
    """Everything, in bytes and seconds."""
    rows = [
        {
            "configuration": plan.name,
            "dtype": plan.dtype,
            "ranks": plan.ranks,
            "relation_groups": plan.groups,
            "waves": plan.waves,
            "fits": plan.fits,
            "reasons": plan.reasons,
            "bytes_per_rank": plan.bytes,
            "available_per_rank": {place: size for place, size in plan.available.items() if place != "nvme"},
            "traffic_bytes_per_pass": plan.traffic,
            "seconds_per_pass_at_least": plan.seconds,
        }
        for plan in found
    ]
    return {"backbone": config.backbone, "method": config.method, "advice": advice(config, found), "plans": rows}


def chart(config: PlanConfig, found: Sequence[Plan]) -> Figure:
    """Stacked bars of GPU and host memory for each configuration, beside what there is."""
    places: list[Place] = ["device", "host"] if config.gpus else ["host"]
    figure = Figure(figsize=(5 * len(places) + 1, 1.6 + 0.45 * len(found)), layout="constrained")
    grid = figure.subplots(1, len(places), sharey=True, squeeze=False)[0]
    for axes, place in zip(grid, places, strict=True):
        for i, plan in enumerate(found):
            stacked(axes, i, plan.bytes[place], 0.7)
            axes.text(plan.total(place) / 1e9, i, f" {gigabytes(plan.total(place))}", va="center", fontsize=8)
        available = found[0].available[place] / 1e9
        axes.axvline(available, color="black", linestyle="--", linewidth=1)
        axes.set_xlim(0, 1.15 * max(available, *(plan.total(place) / 1e9 for plan in found)))
        axes.set_title(
            f"{'GPU' if place == 'device' else 'host'} memory of a rank, GB (dashed: what there is)", fontsize=9
        )
        axes.set_yticks(range(len(found)), [Path(plan.name).stem for plan in found], fontsize=8)
        axes.set_ylim(len(found) - 0.5, -0.5)
        axes.spines[["top", "right"]].set_visible(False)
    legend(figure, {c for plan in found for place in places for c in plan.bytes[place]})
    figure.suptitle(f"{config.method} of {config.backbone} on {found[0].ranks} rank(s)", fontsize=10)
    return figure
