"""Draw the main result, book/images/main-result.png, from the recorded runs.

    python book/_tools/picture.py

The fingerprint of the runs is stored in the picture, so that a test can say when it is out of date.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt

from pslib import plotting
from pslib.experiments import Record, best, by_setting, collect, metric

PICTURE = Path(__file__).resolve().parents[1] / "images" / "main-result.png"
KEY = "Recorded runs"


def fingerprint(records: list[Record]) -> str:
    """SHA-256 over the declarations and final metrics of the runs."""
    facts = [[asdict(r.spec), r.final_metric] for r in records]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def draw(grid: list[Record], units: list[Record]):
    """Left: accuracy against AdamW's learning rate.  Right: one network, five descriptions."""
    plotting.use_style()
    fig, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.1), sharey=True)
    by = by_setting(grid)
    for name in ("adamw", "adamw-0.98"):
        rates = sorted(lr for contender, lr, *_ in by if contender == name)
        curves = [[100 * metric(r) for r in by[name, lr, 1.0, 1.0]] for lr in rates]
        plotting.band(left, rates, np.transpose(curves), **plotting.style_of(name))
    for name in ("psdasgd-tensor", "psdasgd-model"):
        accuracies = [100 * metric(r) for r in best(grid)[name]]
        plotting.band(left, rates, np.transpose([accuracies] * len(rates)), **plotting.style_of(name))
    left.set(xscale="log", xlabel="AdamW's learning rate [x]", ylabel="test accuracy [%]", title="A learning rate to find, or none")
    left.legend(loc="lower center")
    by = by_setting(units)
    rate = max(lr for contender, lr, *_ in by if contender == "adamw")
    factors = sorted({key[3] for key in by})
    for name, lr in (("adamw", rate), ("prodigy-0.98", None), ("psdasgd-model", None), ("psdasgd-tensor", None)):
        curves = [[100 * metric(r) for r in by[name, lr, 1.0, c]] for c in factors]
        label = f"AdamW, learning rate {lr:g}" if lr else None
        style = plotting.style_of(name)
        plotting.band(right, factors, np.transpose(curves), **{**style, "label": label or style["label"], "marker": "o", "markersize": 4})
    right.set_xscale("log", base=2)
    right.set(xlabel="c: first layer × c, second layer ÷ c", title="One function in other units")
    right.legend(loc="lower left")
    return fig


if __name__ == "__main__":
    grid, units = collect("mnist1d-cnn"), collect("units")
    PICTURE.parent.mkdir(exist_ok=True)
    draw(grid, units).savefig(PICTURE, dpi=130, metadata={KEY: fingerprint(grid + units)})
    print(PICTURE)
