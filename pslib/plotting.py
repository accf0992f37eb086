"""One visual language: a style, a colour and a line for each optimizer, curves with seed bands."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import re
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.rcsetup import cycler
from PIL import Image

from .contenders import ALL

__all__ = ["CLASSES", "COLOURS", "band", "dots_with_range", "slider", "style_of", "toggles", "use_style"]

# Okabe and Ito's palette, told apart by readers with any of the common colour-vision deficiencies.
COLOURS = {
    "orange": "#E69F00", "sky": "#56B4E9", "green": "#009E73", "blue": "#0072B2", "vermilion": "#D55E00",
    "purple": "#CC79A7", "black": "#222222", "grey": "#888888",
}

# Eleven of Paul Tol's colours for the classes of a segmented picture, in the order of `pslib.datasets.CAMVID`; void is grey.
CLASSES = [
    "#88CCEE", "#EE8866", "#000000", "#332288", "#AA4499", "#228833", "#FFAABB", "#225522", "#BBCC33", "#FFFFFF", "#882255",
]

_STYLES = {
    "sgd": ("grey", "-"), "momentum": ("grey", "--"), "adam": ("grey", "-."), "adamw": ("black", "-"),
    "adamw-default": ("black", ":"), "adamw-0.98": ("black", "--"), "amsgrad": ("purple", "-."), "rmsprop": ("sky", "--"),
    "adagrad": ("purple", "--"), "dadapt-adam": ("sky", "-"), "dadapt-adam-0.98": ("sky", "-."), "dadapt-sgd": ("sky", ":"),
    "prodigy": ("purple", "-"), "prodigy-0.98": ("purple", "--"), "dog": ("grey", ":"), "ldog": ("sky", "--"), "momo-adam": ("orange", ":"),
    "schedule-free": ("green", ":"), "sps": ("orange", "--"), "ps-sps": ("orange", "-"), "psdasgd-model": ("blue", "--"),
    "psdasgd-tensor": ("vermilion", "-"),
    "weight-norm": ("sky", "-"), "nd-adam": ("green", "-"), "path-sgd": ("green", "--"), "psdasgd-module": ("blue", "-."),
    "psdasgd-neuron": ("orange", "-"), "psdasgd-coordinate": ("orange", ":"), "psdasgd-model-units": ("blue", "-"),
    "psdasgd-module-units": ("green", "-."), "psdasgd-model-neuron-units": ("purple", "-"),
    "psdasgd-tensor-neuron-units": ("vermilion", "--"), "psdasgd-slice": ("sky", "-"),
    "psdasgd-travel": ("vermilion", "-."), "psdasgd-d0--11": ("vermilion", "--"), "psdasgd-d0--14": ("vermilion", ":"),
    "ps-sps-floor": ("orange", "--"),
}


_CSS_LINE = {"-": "solid", "--": "dashed", "-.": "dashed", ":": "dotted"}

_VARIANTS = {
    "adamw-0.98": "AdamW, β₂ = 0.98", "adamw-default": "AdamW, default", "prodigy-0.98": "Prodigy, β₂ = 0.98",
    "dadapt-adam-0.98": "D-Adapt Adam, β₂ = 0.98", "psdasgd-slice": "PS-DA-SGD, tensor, sliced",
    "psdasgd-travel": "PS-DA-SGD, travel 1.5", "psdasgd-d0--11": "PS-DA-SGD, d₀ = 2⁻¹¹", "psdasgd-d0--14": "PS-DA-SGD, d₀ = 2⁻¹⁴",
    "ps-sps-floor": "PS-SPS, f* = the least loss",
}


def use_style() -> None:
    """Set the book's figure style: white card, sharp on every screen, large enough on a phone."""
    mpl.rcParams.update({
        "figure.figsize": (7, 4), "figure.dpi": 96, "savefig.dpi": 96, "figure.facecolor": "white",
        "axes.facecolor": "white", "savefig.facecolor": "white", "figure.constrained_layout.use": True, "font.size": 11,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
        "axes.prop_cycle": cycler(color=[COLOURS[c] for c in ("blue", "vermilion", "green", "orange", "purple", "sky", "black")]),
        "legend.frameon": False, "legend.fontsize": 9, "lines.linewidth": 1.8,
    })


def style_of(name: str) -> dict:
    """Line colour, dash and label of an optimizer (a contender's name, here or in the experiments), the same on every page."""
    colour, dash = _STYLES.get(name, ("black", "-"))
    label = ALL[name].label if name in ALL else _VARIANTS.get(name, name)
    return {"color": COLOURS[colour], "linestyle": dash, "label": label}


def band(ax, x: Sequence[float], curves, **style) -> None:
    """Draw the mean over seeds as a line and lowest to highest as a band.

    Args:
        ax: where to draw.
        x: [points], shared by all seeds.
        curves: [seeds, points].
        style: for the line, such as `style_of(name)`.
    """
    curves = np.asarray(curves, dtype=float)
    (line,) = ax.plot(x, curves.mean(0), **style)
    ax.fill_between(x, curves.min(0), curves.max(0), color=line.get_color(), alpha=0.18, linewidth=0, gid=style.get("gid"))


def dots_with_range(ax, labels: Sequence[str], values: Sequence[Sequence[float]], colours: Sequence[str]) -> None:
    """One row a label: a dot at the mean over seeds and a bar from the lowest to the highest, best at the top.

    Args:
        ax: where to draw.
        labels: one a row, from top to bottom.
        values: for each row the values of the seeds.
        colours: one a row.
    """
    for row, (numbers, colour) in enumerate(zip(values, colours, strict=True)):
        ax.plot([min(numbers), max(numbers)], [row, row], color=colour, linewidth=4, alpha=0.35, solid_capstyle="round")
        ax.plot(np.mean(numbers), row, "o", color=colour)
    ax.set_yticks(range(len(labels)), labels)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)



_MOVE = """
<script>
(function () {
  var box = document.getElementById("%s"), input = box.querySelector("input"), shown = box.querySelector("output");
  var frames = box.querySelectorAll("img");
  input.addEventListener("input", function () {
    frames.forEach(function (frame, i) { frame.hidden = i !== Number(input.value); });
    shown.textContent = frames[input.value].dataset.value;
    input.setAttribute("aria-valuetext", shown.textContent);
  });
})();
</script>
"""


def slider(figures: Mapping[str, plt.Figure], alt: Mapping[str, str], *, name: str, start: str) -> str:
    """Figures behind a slider, as HTML that needs no server and nothing from outside; without scripts, the first one shown.

    Args:
        figures: what the slider says at each position → the figure to show there; they are closed.
        alt: what is seen in each figure.
        name: what is moved, for the label.
        start: the position to begin with.
    """
    images, digest, positions = [], hashlib.sha256(), list(figures)
    for position, figure in figures.items():
        drawn, png = io.BytesIO(), io.BytesIO()
        figure.savefig(drawn, format="png")
        plt.close(figure)
        # A palette of 64 colours makes a frame a quarter as large.
        Image.open(drawn).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(png, "PNG", optimize=True)
        digest.update(png.getvalue())
        images.append(
            f'<img src="data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}" alt="{html.escape(alt[position])}" '
            f'data-value="{html.escape(position)}" style="max-width: 100%"{"" if position == start else " hidden"}>'
        )
    identity, at = f"slider-{digest.hexdigest()[:12]}", positions.index(start)
    return (
        f'<div class="pslib-slider" id="{identity}"><label>{html.escape(name)}: <output>{html.escape(start)}</output><br>'
        f'<input type="range" min="0" max="{len(images) - 1}" step="1" value="{at}" aria-valuetext="{html.escape(start)}" '
        f'style="width: 100%; max-width: 34rem; min-height: 2rem"></label>{"".join(images)}</div>' + _MOVE % identity
    )


_TOGGLE = """
<script>
(function () {
  var box = document.getElementById("%s"), shown = box.querySelector("output"), before = shown.textContent;
  var lines = Array.from(box.querySelectorAll("g[data-series]"));
  function point(name, text) {
    lines.forEach(function (line) { line.style.opacity = name === null || line.dataset.series === name ? "" : "0.15"; });
    shown.textContent = name === null ? before : text;
  }
  box.querySelectorAll("label").forEach(function (label) {
    var input = label.querySelector("input"), name = input.value, text = label.title;
    function show() {
      lines.forEach(function (line) { if (line.dataset.series === name) line.style.display = input.checked ? "" : "none"; });
    }
    input.addEventListener("change", show);
    if ("off" in input.dataset) { input.checked = false; show(); }
    [label].concat(lines.filter(function (line) { return line.dataset.series === name; })).forEach(function (part) {
      part.addEventListener("pointerenter", function () { point(name, text); });
      part.addEventListener("pointerleave", function () { point(null); });
    });
    input.addEventListener("focus", function () { point(name, text); });
    input.addEventListener("blur", function () { point(null); });
  });
  lines.forEach(function (line) {
    Array.from(line.children).filter(function (part) { return part.tagName === "path"; }).forEach(function (path) {
      var wide = path.cloneNode(false);
      wide.setAttribute("style", "fill: none; stroke: transparent; stroke-width: 12; pointer-events: stroke");
      line.appendChild(wide);
    });
  });
})();
</script>
"""


def toggles(figure: plt.Figure, series: Mapping[str, str], alt: str, *, hidden: Sequence[str] = ()) -> str:
    """A figure whose lines are shown and hidden by check boxes, and named when they are pointed at, as HTML.

    It needs no server and nothing from outside; without scripts, every line is shown.

    Args:
        figure: closed here; the artists of a series carry its contender's name as `gid`.
        series: the name of each → what to say when it is pointed at.
        alt: what is seen.
        hidden: the names that are switched off at first.
    """
    drawn = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "pslib", "svg.fonttype": "none"}):
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    plt.close(figure)
    svg = drawn.getvalue()
    # Identifiers inside a picture begin with what it is: two pictures on a page must not share them.
    digest = "p" + hashlib.sha256((svg + alt).encode()).hexdigest()[:12]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg[svg.index("<svg") :], flags=re.S)
    # A style element would reach the whole page.
    svg = svg.replace('<style type="text/css">*{', f'<style type="text/css">#toggles-{digest} svg *{{')

    def named(match: re.Match) -> str:
        return f'<g data-series="{html.escape(match[1])}"' if match[1] in series else f'<g id="{digest}-{match[1]}"'

    svg = re.sub(r'<g id="([^"]+)"', named, svg)
    svg = re.sub(r'(<(?:path|clipPath) id="|xlink:href="#|url\(#)', rf"\1{digest}-", svg)
    css = "max-width: 100%; height: auto; background: white"
    svg = re.sub(r"<svg ", f'<svg role="img" aria-label="{html.escape(alt)}" style="{css}" ', svg, count=1)
    boxes = []
    for name, text in series.items():
        style = style_of(name)
        boxes.append(
            f'<label title="{html.escape(text)}" style="display: inline-block; margin-right: 1em; min-height: 1.6rem">'
            f'<input type="checkbox" value="{html.escape(name)}" checked{" data-off" if name in hidden else ""}> '
            f'<span aria-hidden="true" style="display: inline-block; width: 1.6em; vertical-align: middle; border-top: 3px '
            f'{_CSS_LINE[style["linestyle"]]} {style["color"]}"></span> {html.escape(style["label"])}</label>'
        )
    return (
        f'<div class="pslib-toggles" id="toggles-{digest}">{svg}<p><output>Point at a line, or at its name, to read it.</output></p>'
        f'<div role="group" aria-label="Which lines to show">{"".join(boxes)}</div></div>' + _TOGGLE % f"toggles-{digest}"
    )
