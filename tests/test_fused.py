"""The passes of the fast path: C against torch's operations, chunk by chunk, and where the compiled library comes from.

That the fast path takes the reference loop's steps is in test_correct_under.py.
"""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from pslib import PSDASGD, PSSPS, fused, native

pytestmark = pytest.mark.skipif(native.library() is None, reason="there is no C compiler here")
SHAPES = [(), (1,), (15,), (17, 16), (33, 31), (4099,), (3, 5, 7, 2)]
SETTINGS = {
    "tensor": dict(), "eps": dict(eps=1e-3), "model": dict(per="model"), "units": dict(units="tensor"), "slices": dict(slice_p=3),
    "decay": dict(weight_decay=0.01, maximize=True), "travel": dict(travel=2.0),
    "travel-units": dict(travel=2.0, units="tensor", slice_p=2),
}


def trained(make, dtype):
    """Parameters and optimizer after twelve steps with given gradients; some are missing at some steps."""
    generator = torch.Generator().manual_seed(0)

    def random(shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    params = [nn.Parameter(random(shape)) for shape in SHAPES]
    params[-1].data = params[-1].data.to(memory_format=torch.channels_last)
    opt = make(params)
    for k in range(12):
        for i, p in enumerate(params):
            p.grad = None if (i + k) % 5 == 4 else random(p.shape) * (k + 1)
        opt.step(loss=float(k + 1)) if isinstance(opt, PSSPS) else opt.step()
    return params, opt


def numbers(params, opt):
    return [p.detach().double() for p in params] + [v.double() for p in params for v in opt.state[p].values()]


def close(mine, theirs, rel):
    """Every tensor to that part of its largest element: sums in another order differ by roundings of their largest terms."""
    def allowed(y):
        return rel * float(y.abs().nan_to_num().max())

    return all(torch.allclose(x, y, rtol=0, atol=allowed(y), equal_nan=True) for x, y in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("name", [*SETTINGS, "ps-sps", "ps-sps-eps"])
@pytest.mark.parametrize("dtype, rel", [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 2e-2)], ids=str)
def test_c_and_torch_take_the_same_steps(name, dtype, rel, monkeypatch):
    """Twelve steps; a few hundred roundings of 2⁻⁵², 2⁻²³ or 2⁻⁸ each, some of differences that are small themselves."""
    def make(params):
        if name.startswith("ps-sps"):
            return PSSPS(params, fused=True, eps=1e-3 if name.endswith("eps") else 0.0)
        return PSDASGD(params, fused=True, **SETTINGS[name])

    params, opt = trained(make, dtype)
    assert isinstance(opt._plan.passes, native.Passes)
    monkeypatch.setattr(native, "library", lambda: None)
    others, other = trained(make, dtype)
    assert type(other._plan.passes) is fused.Passes
    assert close(numbers(params, opt), numbers(others, other), rel)


@pytest.mark.parametrize("slice_p", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_nothing_depends_on_where_the_chunks_are_cut(slice_p, dtype, monkeypatch):
    """v does not depend on any sum, and is the same bit for bit; the rest to the rounding of sums in another order."""
    def make(params):
        return PSDASGD(params, fused=True, slice_p=slice_p)

    whole = trained(make, dtype)
    monkeypatch.setattr(native, "CHUNK", 48)
    pieces = trained(make, dtype)
    assert len(pieces[1]._plan.passes.tables[0].chunks) > 5 * len(whole[1]._plan.passes.tables[0].chunks)
    for p, q in zip(whole[0], pieces[0], strict=True):
        assert torch.equal(whole[1].state[p]["exp_avg_sq"], pieces[1].state[q]["exp_avg_sq"])
    assert close(numbers(*whole), numbers(*pieces), 1e-13 if dtype == torch.float64 else 1e-5)


def test_a_step_tells_autograd_that_the_parameters_changed():
    """Otherwise a backward pass through the old values would silently use the new ones."""
    x = nn.Parameter(torch.ones(3))
    opt = PSDASGD([x], fused=True)
    loss = (x * x).sum()
    x.grad = torch.ones(3)
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- the compiled library -----------------------------------------------------------------------------------

PROGRAM = """
import torch
from pslib import PSDASGD, native
x = torch.nn.Parameter(torch.ones(5))
opt = PSDASGD([x], fused=True)
x.grad = torch.ones(5)
opt.step()
print(native.library() is not None, type(opt._plan.passes).__module__, bool((x < 1).all()))
"""


def elsewhere(**environment):
    """The program's output in a process of its own."""
    root = str(Path(__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**os.environ, "PYTHONPATH": root, **environment}, capture_output=True, text=True, check=True,
    )
    return done.stdout.split()


def test_the_library_is_compiled_once_and_then_found_in_the_cache(tmp_path):
    (tmp_path / "counted").write_text('#!/bin/sh\necho x >> "$(dirname "$0")/calls"\nexec cc "$@"\n')
    (tmp_path / "counted").chmod(0o700)
    for _ in range(2):
        assert elsewhere(CC=f"{tmp_path}/counted -w", XDG_CACHE_HOME=str(tmp_path / "cache")) == ["True", "pslib.native", "True"]
    assert (tmp_path / "calls").read_text() == "x\n"
    [kept] = (tmp_path / "cache" / "pslib").iterdir()
    assert kept.suffix in (".so", ".dylib") and stat.S_ISREG(kept.stat().st_mode)


def test_a_cache_that_cannot_be_written_does_not_matter(tmp_path):
    (tmp_path / "file").write_text("")
    assert elsewhere(XDG_CACHE_HOME=str(tmp_path / "file")) == ["True", "pslib.native", "True"]


@pytest.mark.parametrize("cc", ["false", "no-such-compiler"])
def test_without_a_compiler_torch_does_it(cc, tmp_path):
    assert elsewhere(CC=cc, XDG_CACHE_HOME=str(tmp_path)) == ["False", "pslib.fused", "True"]
