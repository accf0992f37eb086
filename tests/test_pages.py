"""What the README and the landing page promise."""

import importlib.util
import re
from pathlib import Path

import torch
from PIL import Image

from pslib.experiments import collect

ROOT = Path(__file__).resolve().parents[1]


def picture():
    spec = importlib.util.spec_from_file_location("picture", ROOT / "book" / "_tools" / "picture.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_main_picture_was_drawn_from_the_recorded_runs():
    tool = picture()
    stored = Image.open(tool.PICTURE).text[tool.KEY]
    assert stored == tool.fingerprint(collect("mnist1d-cnn") + collect("units"))
    assert stored != tool.fingerprint(collect("mnist1d-cnn"))


def test_the_readme_shows_the_picture_and_the_two_commands():
    text = (ROOT / "README.md").read_text()
    assert f"]({picture().PICTURE.relative_to(ROOT)})" in text
    assert re.search(r"^make book\b", text, re.M) and re.search(r"^make test\b", text, re.M)


def test_the_readmes_diff_runs_as_written():
    diff = re.search(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), re.S).group(1).splitlines()
    assert len(diff) == 3
    names = {"model": torch.nn.Linear(3, 1), "torch": torch}
    exec("\n".join(line[2:] for line in diff if line.startswith("+")), names)
    model, optimizer = names["model"], names["optimizer"]
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 100
