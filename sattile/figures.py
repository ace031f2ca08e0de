"""Figures of the report: SVG whose ink is the page's, so that it follows it into the dark and onto paper. Owns
matplotlib."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sattile.split import SPLITS

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def split_rank(name: str) -> int:
    return [*SPLITS, name].index(name)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


INK, LINES, PAPER = "#010203", "#040506", "#070809"
_VARIABLES = {INK: "var(--ink)", LINES: "var(--line)", PAPER: "var(--paper)"}

BLUE, ORANGE, RED, GREEN = "#3b7dd8", "#d9822b", "#d1495b", "#2a9d6f"


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _axes_style(axes: Any) -> None:
    axes.set_facecolor("none")
    axes.tick_params(colors=INK, labelsize=9, length=0)
    axes.grid(color=LINES, linewidth=0.8)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)


def svg(figure: Figure, label: str) -> str:
    """A figure as an SVG element for inlining: the same bytes each time, its text real text.

    Args:
        figure: drawn with INK, LINES and PAPER for what should follow the page.
        label: what it shows, for those who cannot see it.
    """
    import matplotlib
    from markupsafe import Markup, escape

    text = io.StringIO()
    settings: Any = {
        "svg.hashsalt": "sattile",
        "svg.fonttype": "none",
        "font.family": ["sans-serif"],
        "font.sans-serif": ["DejaVu Sans"],
    }
    with matplotlib.rc_context(settings):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawing = text.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 var(--sans)", drawing)
    drawing = re.sub(r' xmlns:xlink="[^"]*"', "", drawing).replace("xlink:href", "href")
    for color, variable in _VARIABLES.items():
        drawing = drawing.replace(color, variable)
    # The width goes: the page decides; the view box keeps the shape.
    opening = re.sub(r'<svg height="[^"]*"', "<svg", drawing[: drawing.index(">")])
    opening = re.sub(r' (width|height)="[^"]*"', "", opening)
    opening = opening.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
    return Markup(opening + drawing[drawing.index(">") :])


def curves_figure(history: Sequence[dict[str, Any]], judged: str = "validation") -> str | None:
    """Loss and mIoU by epoch; None if nothing was recorded.

    Args:
        judged: the tiles that were looked at after each epoch.
    """
    panels = [
        ("loss", (("loss", "training", BLUE), ("val_loss", judged, ORANGE))),
        ("mIoU", (("val_miou", judged, ORANGE),)),
    ]
    drawn = []
    for title, lines in panels:
        found = []
        for key, label, color in lines:
            points = [(row.get("epoch", i + 1), row[key]) for i, row in enumerate(history) if is_number(row.get(key))]
            if points:
                found.append((key, label, color, points))
        if found:
            drawn.append((title, found))
    if not drawn:
        return None
    from matplotlib.ticker import MaxNLocator

    figure = _figure(4.4 * len(drawn), 2.8)
    for position, (title, lines_found) in enumerate(drawn):
        axes = figure.add_subplot(1, len(drawn), position + 1)
        _axes_style(axes)
        for key, label, color, points in lines_found:
            epochs, values = zip(*points, strict=True)
            axes.plot(epochs, values, color=color, linewidth=2, marker="o", markersize=3.2, label=label)
            if key == "val_miou":
                top = values.index(max(values))
                axes.annotate(
                    f"best {values[top]:.3f}",
                    (epochs[top], values[top]),
                    textcoords="offset points",
                    xytext=(0, -15),
                    ha="center",
                    fontsize=9,
                    color=INK,
                )
                axes.plot([epochs[top]], [values[top]], "o", markersize=8, mfc="none", mec=color, mew=1.5)
        axes.set_title(title, loc="left", fontsize=10.5, color=INK, fontweight="bold")
        axes.set_xlabel("epoch", fontsize=9, color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.margins(y=0.16)
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    return svg(figure, "training curves: " + " and ".join(title for title, _ in drawn) + " by epoch")


SPLIT_COLORS = {"train": BLUE, "val": ORANGE, "test": GREEN}


def footprint_figure(scenes: Sequence[dict[str, Any]], tiles: dict[str, list[list[tuple[float, float]]]]) -> str | None:
    """Where the scenes lie, which were refused, and which ground went to which split; None without footprints.

    Args:
        scenes: with `number`, `footprint` (WKB in EPSG:4326 or None) and `refused`.
        tiles: outlines in degrees by split.
    """
    import shapely
    from matplotlib.collections import PolyCollection
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    shapes = [(scene, shapely.from_wkb(scene["footprint"])) for scene in scenes if scene.get("footprint")]
    shapes = [(scene, shape) for scene, shape in shapes if not shape.is_empty]
    if not shapes:
        return None
    west, south, east, north = shapely.total_bounds([shape for _, shape in shapes])
    middle = (south + north) / 2
    aspect = 1 / max(0.05, math.cos(math.radians(middle)))
    wide = max(east - west, 1e-6)
    tall = max(north - south, 1e-6) * aspect
    figure = _figure(8.6, min(7.5, max(2.6, 8.0 * tall / wide + 0.8)))
    axes = figure.add_subplot()
    _axes_style(axes)
    handles: list[Any] = []
    for split, outlines in sorted(tiles.items(), key=lambda item: split_rank(item[0])):
        color = SPLIT_COLORS.get(split, "#888888")
        axes.add_collection(PolyCollection(outlines, facecolors=color, alpha=0.38, edgecolors="none"))
        handles.append(Patch(facecolor=color, alpha=0.38, label=f"{SPLITS.get(split, split)} tiles"))
    kept = refused = False
    for scene, shape in shapes:
        bad = bool(scene.get("refused"))
        kept, refused = kept or not bad, refused or bad
        for part in getattr(shape, "geoms", [shape]):
            if part.geom_type != "Polygon":
                continue
            x, y = part.exterior.xy
            axes.plot(x, y, color=RED if bad else INK, linewidth=1.8 if bad else 1.1, linestyle="--" if bad else "-")
        if len(shapes) <= 60:
            # At a corner: footprints of overlapping scenes share their middles, seldom their corners.
            corner_x, corner_y = shape.bounds[0], shape.bounds[3]
            axes.annotate(
                str(scene["number"]),
                (corner_x, corner_y),
                textcoords="offset points",
                xytext=(5, -12),
                fontsize=9.5,
                fontweight="bold",
                color=RED if bad else INK,
            )
    if kept:
        handles.append(Line2D([], [], color=INK, linewidth=1.1, label="scene"))
    if refused:
        handles.append(Line2D([], [], color=RED, linewidth=1.8, linestyle="--", label="refused later"))
    axes.set_aspect(aspect)
    axes.margins(0.03)
    axes.autoscale_view()
    axes.ticklabel_format(useOffset=False, style="plain")
    axes.xaxis.set_major_formatter("{x:g}°")
    axes.yaxis.set_major_formatter("{x:g}°")
    figure.legend(handles=handles, loc="outside lower left", ncols=5, frameon=False, fontsize=9, labelcolor=INK)
    return svg(figure, f"map of the footprints of {len(shapes)} scenes")


MODELS = (BLUE, ORANGE, GREEN, RED, "#8c6bb1", "#7f7f7f")
"""Colours of models side by side."""


def reliability_figure(curves: Sequence[tuple[str, Mapping[str, Any]]]) -> str | None:
    """How often models are right by how sure they say they are, above how often they say so; None without any.

    Bins that hold less than a thousandth of the pixels are left out: their shares are chance.

    Args:
        curves: (name, `calibration` of `metrics.json`) of each model.
    """
    drawn = []
    for name, found in curves:
        total = sum(one["pixels"] for one in found["bins"])
        drawn.append((name, [one for one in found["bins"] if one["pixels"] > total / 1000]))
    if not any(bins for _, bins in drawn):
        return None
    least = min(bins[0]["from"] for _, bins in drawn if bins)
    figure = _figure(5.2, 4.6)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    for axes in (upper, lower):
        _axes_style(axes)
    upper.plot([least, 1], [least, 1], color=INK, linewidth=1, linestyle="--", label="as sure as right")
    for (name, bins), color in zip(drawn, _colors(len(drawn)), strict=True):
        total = sum(one["pixels"] for one in bins)
        at = [one["confidence"] for one in bins]
        upper.plot(
            at, [one["accuracy"] for one in bins], color=color, linewidth=2, marker="o", markersize=3.6, label=name
        )
        edges = [(one["from"], one["to"], one["pixels"] / total) for one in bins]
        if len(drawn) == 1:
            lower.bar([a for a, _, _ in edges], [n for _, _, n in edges], [b - a for a, b, _ in edges], align="edge",
                      color=color, edgecolor=PAPER, linewidth=0.8)  # fmt: skip
        else:
            lower.plot(at, [n for _, _, n in edges], color=color, linewidth=1.6)
    upper.set_ylabel("share that is right", fontsize=9, color=INK)
    lower.set_ylabel("of pixels", fontsize=9, color=INK)
    lower.set_xlabel("score of the class that was chosen", fontsize=9, color=INK)
    lower.set_ylim(bottom=0)
    upper.legend(loc="lower right", frameon=False, fontsize=9, labelcolor=INK)
    return svg(figure, "reliability: share of right pixels by score, of " + ", ".join(name for name, _ in drawn))


def intervals_figure(
    groups: Sequence[str], models: Sequence[tuple[str, Sequence[tuple[float | None, Sequence[float] | None]]]]
) -> str | None:
    """Values with their intervals as whiskers, models side by side; None without any.

    Args:
        groups: what is measured: mIoU, and the IoU of each class.
        models: (name, (value, interval) of each group).
    """
    if all(value is None for _, values in models for value, _ in values):
        return None
    figure = _figure(7.6, 0.9 + 0.22 * len(groups) * (len(models) + 1.2))
    axes = figure.add_subplot()
    _axes_style(axes)
    room = 0.8 / len(models)
    for index, ((name, values), color) in enumerate(zip(models, _colors(len(models)), strict=True)):
        for group, (value, between) in enumerate(values):
            at = group + (index - (len(models) - 1) / 2) * room
            if between is not None:
                axes.plot(between, [at, at], color=color, linewidth=2, solid_capstyle="butt")
                axes.plot(between, [at, at], "|", color=color, markersize=7, mew=1.6)
            if value is not None:
                axes.plot([value], [at], "o", color=color, markersize=6)
        axes.plot([], [], "o-", color=color, markersize=6, linewidth=2, label=name)
    axes.set_yticks(range(len(groups)), groups, fontsize=10)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("IoU, with its interval", fontsize=9, color=INK)
    figure.legend(loc="outside lower left", ncols=3, frameon=False, fontsize=9, labelcolor=INK)
    return svg(figure, "IoU of " + ", ".join(name for name, _ in models) + " with intervals")


def _colors(count: int) -> list[str]:
    return [MODELS[index % len(MODELS)] for index in range(count)]
