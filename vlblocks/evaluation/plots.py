"""Pictures of a run: the curves of its losses, and which codes fire on which patches and words."""

from __future__ import annotations

import math
import os
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, MaxNLocator

from vlblocks.errors import UserError

__all__ = ["GroundingExample", "plot_curves", "plot_grounding", "shared_codes"]

# The palette of Okabe and Ito (2008) without black and yellow: told apart with every kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, FAINT = "#222222", "#8A8A8A"


class GroundingExample(NamedTuple):
    """One pair and the codes it picked.

    Attributes:
        image: [H, W, 3] uint8 array or tensor.
        words: T words of the caption.
        patch_activations: [K, h, w] in [0, 1]: how strongly each picked code fires on each patch.
        word_activations: [K, T] in [0, 1]: and on each word.
        codes: [K] index of each picked code in the codebook.
    """

    image: Any
    words: Sequence[str]
    patch_activations: Any
    word_activations: Any
    codes: Any


def plot_curves(
    history: Mapping[str, Sequence[tuple[float, float]]],
    path: str | os.PathLike[str],
    *,
    title: str = "",
    columns: int = 3,
    smooth: float = 0.05,
) -> None:
    """Draw every curve in a panel of its own, raw and smoothed, as one PNG that is written whole or not at all.

    Args:
        history: name -> (step, value) pairs in order of step; values that are not finite leave gaps.
        path: the PNG.
        title: above all panels.
        columns: panels side by side.
        smooth: the running mean's memory as a share of the curve's points.

    Raises:
        UserError: there is no curve.
    """
    if not history:
        raise UserError(f"{path}: no curves to draw; log at least one value first")
    columns = min(columns, len(history))
    rows = math.ceil(len(history) / columns)
    figure = _figure(3.7 * columns, 2.5 * rows + (0.35 if title else 0.0))
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, (name, points) in zip(panels, history.items(), strict=False):
        steps = np.asarray([step for step, _ in points], dtype=float)
        values = np.asarray([value for _, value in points], dtype=float)
        values[~np.isfinite(values)] = np.nan
        memory = max(1.0, smooth * len(values))
        few = len(values) < 30
        dense = {"linewidth": 0.7, "alpha": 0.35} if not few else {"linewidth": 1.4, "marker": "o", "markersize": 3}
        panel.plot(steps, values, color=COLOURS[0], label="each step", **dense)
        if not few:
            panel.plot(steps, _running_mean(values, memory), color=COLOURS[1], linewidth=1.6, label="running mean")
        panel.set_title(_readable(name), loc="left", fontsize=10, color=INK)
        if np.isfinite(values).any():
            last = (values if few else _running_mean(values, memory))[np.isfinite(values)][-1]
            panel.set_title(f"{last:.4g}", loc="right", fontsize=9, color=COLOURS[0] if few else COLOURS[1])
            _limit(panel, values)
        _clean(panel)
        if len(steps) and steps[-1] - steps[0] < 2:
            panel.set_xlim(steps[0] - 1, steps[-1] + 1)
        panel.set_xlabel("step", fontsize=8, color=FAINT)
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        panel.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
        panel.yaxis.set_major_locator(MaxNLocator(nbins=4))
    for panel in panels[len(history) :]:
        panel.set_axis_off()
    lines = max((panel.get_lines() for panel in panels[: len(history)]), key=len)
    if len(lines) > 1:
        figure.legend(
            handles=list(lines), loc="outside lower right", ncols=2, fontsize=8, frameon=False, labelcolor=INK
        )
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=INK)
    _save(figure, path)


def shared_codes(example: GroundingExample, count: int) -> list[int]:
    """Rows of the codes that say most about both sides of a pair, best first.

    A code counts by how far its strongest patch and its strongest word rise above its mean patch and mean word:
    one that fires everywhere, or on one side only, locates nothing.
    """
    patches = np.asarray(example.patch_activations, dtype=float).reshape(len(example.codes), -1)
    words = np.asarray(example.word_activations, dtype=float)
    rise = (patches.max(1) - patches.mean(1)) * (words.max(1) - words.mean(1))
    return np.argsort(-rise, kind="stable")[:count].tolist()


def plot_grounding(
    path: str | os.PathLike[str],
    items: Sequence[GroundingExample],
    *,
    codes_per_pair: int = 3,
    title: str = "",
    most_words: int = 16,
) -> None:
    """Draw, per pair, on which patches and on which words its most telling codes fire, as one PNG.

    A row is a pair: the image; for each of a few codes the image in grey under that code's heat; and the caption's
    words with a bar per code in the same colour. Heat runs from the code's weakest to its strongest patch (the range
    stands below), bars from 0 to 1.

    Raises:
        UserError: there are no pairs, or a pair's shapes do not fit together.
    """
    if not items:
        raise UserError(f"{path}: no pairs to draw; give at least one")
    for number, item in enumerate(items):
        _check_example(number, item)
    shown = min(codes_per_pair, len(COLOURS), *(len(item.codes) for item in items))
    longest = [_words(item, most_words) for item in items]
    height = [max(1.95, 0.17 * len(words) + 0.45) for words in longest]
    label = 0.085 * max(len(word) for words in longest for word in words)
    widths = [1.6] * (1 + shown) + [0.15] + [0.95] * shown
    figure = _figure(sum(widths) + label + 0.12 * len(widths), sum(height) + 0.6 + (0.35 if title else 0.0))
    figure.set_layout_engine(
        ConstrainedLayoutEngine(rect=(0, 0.3 / figure.get_figheight(), 1, 1 - 0.3 / figure.get_figheight()))
    )
    grid = figure.add_gridspec(len(items), len(widths), width_ratios=widths, height_ratios=height)
    for row, (item, words) in enumerate(zip(items, longest, strict=True)):
        image = np.asarray(item.image)
        grey = image @ np.array([0.299, 0.587, 0.114]) / 255
        photo = figure.add_subplot(grid[row, 0])
        photo.imshow(image, interpolation="nearest" if max(image.shape) < 160 else "antialiased")
        photo.set_title(f"pair {row + 1}", fontsize=9, color=INK)
        _bare(photo)
        for column, code in enumerate(shared_codes(item, shown)):
            name, colour = f"code {int(item.codes[code])}", COLOURS[column]
            heat = np.asarray(item.patch_activations[code], dtype=float)
            panel = figure.add_subplot(grid[row, 1 + column])
            _overlay(panel, grey, heat, colour)
            panel.set_title(name, fontsize=9, color=colour, fontweight="bold")
            panel.set_xlabel(f"{heat.min():.2f} to {heat.max():.2f}", fontsize=7.5, color=FAINT, labelpad=2)
            bars = figure.add_subplot(grid[row, 2 + shown + column])
            _word_bars(bars, words, np.asarray(item.word_activations[code], dtype=float), colour, first=column == 0)
            bars.set_title(name, fontsize=9, color=colour, fontweight="bold")
    figure.text(
        0.01,
        0.008,
        "Heat: how strongly a picked code fires on each patch, from its weakest to its strongest (range below). "
        "Bars: on each word, 0 to 1.",
        fontsize=8,
        color=FAINT,
        va="bottom",
    )
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=INK)
    _save(figure, path)


def _check_example(number: int, item: GroundingExample) -> None:
    image, patches, words = (np.shape(a) for a in (item.image, item.patch_activations, item.word_activations))
    codes = len(item.codes)
    if len(image) != 3 or image[2] != 3:
        raise UserError(f"items[{number}].image: expected [H, W, 3], got {list(image)}")
    if len(patches) != 3 or patches[0] != codes or words != (codes, len(item.words)) or not codes or not item.words:
        raise UserError(
            f"items[{number}]: expected patch_activations [K, h, w], word_activations [K, T], T words and K codes, got "
            f"{list(patches)}, {list(words)}, {len(item.words)} and {codes}"
        )


def _overlay(panel: Axes, grey: np.ndarray, heat: np.ndarray, colour: str) -> None:
    rows, columns = grey.shape
    panel.imshow(0.35 + 0.6 * grey, cmap="gray", vmin=0, vmax=1, interpolation="nearest", extent=(0, columns, rows, 0))
    spread = heat.max() - heat.min()
    level = (heat - heat.min()) / spread if spread > 0 else np.zeros_like(heat)
    red, green, blue = to_rgb(colour)
    fade = LinearSegmentedColormap.from_list("fade", [(red, green, blue, 0.0), (red, green, blue, 0.8)])
    panel.imshow(level, cmap=fade, vmin=0, vmax=1, interpolation="nearest", extent=(0, columns, rows, 0))
    _bare(panel)


def _word_bars(panel: Axes, words: list[str], values: np.ndarray, colour: str, *, first: bool) -> None:
    values = values[: len(words)]
    places = np.arange(len(words))
    panel.barh(places, np.ones(len(words)), color="#F0F0F0", height=0.72)
    panel.barh(places, values, color=colour, height=0.72)
    panel.set_ylim(len(words) - 0.4, -0.6)
    panel.set_xlim(0, 1)
    panel.set_yticks(places, words if first else [""] * len(words), fontsize=8.5, color=INK)
    panel.set_xticks([])
    panel.tick_params(length=0)
    for spine in panel.spines.values():
        spine.set_visible(False)


def _words(item: GroundingExample, most: int) -> list[str]:
    def short(word: str) -> str:
        # A dollar sign would start matplotlib's mathematics.
        return (word if len(word) <= 14 else word[:13] + "…").replace("$", r"\$")

    return [short(word) for word in item.words[:most]]


def _readable(name: str) -> str:
    return name.replace("/", " · ").replace("_", " ")


def _running_mean(values: np.ndarray, memory: float) -> np.ndarray:
    """Exponential mean over about `memory` points, unbiased at the start; gaps are skipped."""
    keep = 1 - 1 / memory
    mean = np.empty_like(values)
    total = weight = 0.0
    for place, value in enumerate(values):
        if np.isfinite(value):
            total, weight = keep * total + value, keep * weight + 1.0
        mean[place] = total / weight if weight else np.nan
    return mean


def _limit(panel: Axes, values: np.ndarray) -> None:
    """Leave a few spikes out of sight when they would flatten the rest of the curve."""
    known = values[np.isfinite(values)]
    low, high = np.quantile(known, [0.005, 0.995])
    spread = high - low
    if spread > 0 and known.max() - known.min() > 3 * spread:
        panel.set_ylim(max(known.min(), low - 0.5 * spread), min(known.max(), high + 0.5 * spread))


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _clean(panel: Axes) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color("#BBBBBB")
    panel.tick_params(labelsize=8, colors="#555555", length=3)
    panel.grid(axis="y", color="#E6E6E6", linewidth=0.7)
    panel.set_axisbelow(True)


def _bare(panel: Axes) -> None:
    panel.set_xticks([])
    panel.set_yticks([])
    for spine in panel.spines.values():
        spine.set_visible(False)


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        figure.savefig(temporary, dpi=150, format="png")
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()
