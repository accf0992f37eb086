"""What a step costs: time, bytes moved and state, of every contender in one process, on the same parameters and gradients::

    python -m pslib.speed [--parameters 23.1M] [--tensors 1] [--threads 2] [--rounds 15] [--device cpu|cuda] [--only NAME …]
    python -m pslib.speed --mode many                                 # one total in 1, 10, …, 10,000 tensors
    python -m pslib.speed --mode both --output book/speed/cpu.json    # what the book keeps

The contenders take turns, so that whatever else the machine does hits all of them, and every ratio is taken within a round.
Beside them runs a plain sum of two long vectors (y ← y + 2z), whose speed is what the machine's memory gives.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import contenders, experiments

__all__ = [
    "COMMAND", "CONTENDERS", "FOLDER", "MANY", "REFERENCE", "SUM", "Contender", "Ratio", "Recording", "Run", "Timing", "bandwidth",
    "load", "make", "measure", "moved_bytes", "ratios", "save", "share", "state_bytes",
]

FOLDER = Path(__file__).resolve().parent.parent / "book" / "speed"
COMMAND = "python -m pslib.speed --mode both"
REFERENCE, SUM = "adamw-fused", "sum"
TENSORS, TOTAL = (1, 10, 100, 1_000, 10_000), 1_000_000
WARM_UP = 2
Pass = tuple[str, str]


@dataclass(frozen=True)
class Contender:
    """An optimizer as it is timed.

    Attributes:
        label: its name in tables and figures.
        optimizer, settings: what `pslib.contenders.make` is given.
        passes: what one step must move, for each pass over the parameters the tensors read and those written; "s/11" is a
            tensor of which every eleventh part is kept.  A new pass begins where a sum over all parameters must be known
            before the first of them may be written.
    """

    label: str
    optimizer: str
    settings: dict[str, Any] = field(default_factory=dict)
    passes: tuple[Pass, ...] = ()

    @property
    def peer(self) -> bool:
        """Whether it is someone else's method without a learning rate."""
        made = contenders.ALL[self.optimizer]
        return made.learning_rate_free and made.package != "pslib"


_ADAM: tuple[Pass, ...] = (("x g m v", "x m v"),)
_POLYAK: tuple[Pass, ...] = (("g v", ""), *_ADAM)
_FULL: tuple[Pass, ...] = (("g v", ""), ("x g m v s x0", "x m v s"))
_SLICED: tuple[Pass, ...] = (("g v/11", ""), ("x g m v s/11 x0/11", "x m v s/11"))

CONTENDERS = {
    REFERENCE: Contender("AdamW, fused", "adamw", {"fused": True}, _ADAM),
    "adamw-foreach": Contender("AdamW, foreach", "adamw", {"foreach": True}, _ADAM),
    "adamw-loop": Contender("AdamW, for-loop", "adamw", {"foreach": False, "fused": False}, _ADAM),
    "psdasgd": Contender("PS-DA-SGD", "psdasgd-tensor", {"fused": True}, _FULL),
    "psdasgd-slice": Contender("PS-DA-SGD, slice_p = 11", "psdasgd-tensor", {"fused": True, "slice_p": 11}, _SLICED),
    "psdasgd-model-units": Contender("PS-DA-SGD, model, units per tensor", "psdasgd-model-units", {"fused": True}, _FULL),
    "psdasgd-reference": Contender("PS-DA-SGD, reference loop", "psdasgd-tensor", {"fused": False}, _FULL),
    "ps-sps": Contender("PS-SPS", "ps-sps", {"fused": True}, _POLYAK),
    "ps-sps-reference": Contender("PS-SPS, reference loop", "ps-sps", {"fused": False}, _POLYAK),
    "prodigy": Contender("Prodigy", "prodigy", {}, (("x g m v s x0", "x m v s"),)),
    "prodigy-slice": Contender("Prodigy, slice_p = 11", "prodigy", {"slice_p": 11}, (("x g m v s/11 x0/11", "x m v s/11"),)),
    "dadapt-adam": Contender("D-Adapt Adam", "dadapt-adam", {}, (("x g m v s", "x m v s"),)),
    "dadapt-sgd": Contender("D-Adapt SGD", "dadapt-sgd", {}, (("x g s x0", "x s z"),)),
    "schedule-free": Contender("Schedule-Free AdamW", "schedule-free", {}, (("x g v z", "x v z"),)),
    "dog": Contender("DoG", "dog", {}, (("x g x0", ""), ("x g", "x"))),
    "momo-adam": Contender("MoMo-Adam", "momo-adam", {}, (("x g m v", "m v"), ("x m v", "x"))),
}
MANY = (REFERENCE, "adamw-foreach", "adamw-loop", "psdasgd", "psdasgd-slice", "psdasgd-reference", "ps-sps", "prodigy")


def _checked(name: str) -> Contender:
    if name not in CONTENDERS:
        raise ValueError(f"there is no contender {name!r}; choose one of {', '.join(CONTENDERS)}.")
    return CONTENDERS[name]


def make(name: str, params: Iterable) -> torch.optim.Optimizer:
    """Make the optimizer `name` (a key of `CONTENDERS`) for `params`, ready to step.

    Raises:
        ValueError: if there is no contender of that name, or it cannot be had fast here.
        ImportError: if its package is not installed.
    """
    contender = _checked(name)
    optimizer: Any = contenders.make(contender.optimizer, params, **contender.settings)
    if callable(getattr(optimizer, "train", None)):
        optimizer.train()
    return optimizer


def moved_bytes(name: str, itemsize: int = 4) -> Fraction:
    """Bytes that a step must move for each parameter, if no cache holds the parameters from one pass to the next.

    Args:
        name: a key of `CONTENDERS`, or "sum".
        itemsize: bytes of one number.
    """
    passes = (("y z", "y"),) if name == SUM else _checked(name).passes
    parts = [tensor.partition("/")[2] or "1" for one in passes for tensor in " ".join(one).split()]
    return itemsize * sum((1 / Fraction(part) for part in parts), Fraction(0))


# --- measuring --------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Timing:
    """What one contender's step was measured to cost.

    Attributes:
        name: a key of `CONTENDERS`, or "sum".
        seconds: wall time of a step in each round, after two rounds to warm up.
        state_bytes: what the optimizer keeps, bytes a parameter.
        host_reads: how often a step reads a number out of a tensor, which on a GPU waits for all that is queued.  On a CPU a
            step counter that is a tensor counts too, though on a GPU it would stay on the host.
    """

    name: str
    seconds: tuple[float, ...]
    state_bytes: float
    host_reads: int

    @property
    def median(self) -> float:
        """Of the rounds, seconds."""
        return _quantile(self.seconds, 0.5)

    @property
    def moved_bytes(self) -> float:
        """What the model says must be moved, bytes a parameter (float32)."""
        return float(moved_bytes(self.name))


@dataclass(frozen=True)
class Ratio:
    """A ratio of times, taken round by round, no units.

    Attributes:
        median: over the rounds.
        low, high: the quartiles.
    """

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Run:
    """All contenders on the same parameters.

    Attributes:
        parameters, tensors: how many parameters, split evenly over how many tensors.
        timings: one a contender.
    """

    parameters: int
    tensors: int
    timings: tuple[Timing, ...]

    def __getitem__(self, name: str) -> Timing:
        return next(t for t in self.timings if t.name == name)


def _quantile(values: Sequence[float], q: float) -> float:
    """With linear interpolation."""
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    below = math.floor(at)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (at - below) * (ordered[above] - ordered[below])


def ratios(timings: Iterable[Timing], reference: str = REFERENCE) -> dict[str, Ratio]:
    """For each contender its time over the reference's in the same round.

    Raises:
        ValueError: if the reference is not among the timings.
    """
    of = {t.name: t.seconds for t in timings}
    if reference not in of:
        raise ValueError(f"there is no timing of {reference!r} to compare with.")
    found = {}
    for name, seconds in of.items():
        rounds = [a / b for a, b in zip(seconds, of[reference], strict=True)]
        found[name] = Ratio(*(_quantile(rounds, q) for q in (0.5, 0.25, 0.75)))
    return found


def bandwidth(run: Run) -> float:
    """What the plain sum moved, bytes a second."""
    return run.parameters * run[SUM].moved_bytes / run[SUM].median


def share(run: Run, name: str) -> float:
    """The bytes that the contender `name` of a `run` must move over those that the plain sum would have moved in its time."""
    return run.parameters * run[name].moved_bytes / run[name].median / bandwidth(run)


def _storages(thing: Any, held: dict[int, int], seen: set[int]) -> None:
    """Storages of all tensors in it, address → bytes: packages keep state in groups and attributes too."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if torch.is_tensor(thing):
        held[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    elif isinstance(thing, Mapping):
        for part in thing.values():
            _storages(part, held, seen)
    elif isinstance(thing, (list, tuple)):
        for part in thing:
            _storages(part, held, seen)
    elif hasattr(thing, "__dict__") and not callable(thing):
        _storages(vars(thing), held, seen)


def state_bytes(optimizer: torch.optim.Optimizer) -> float:
    """Bytes that the optimizer keeps for each parameter; parameters and gradients do not count, shared storage counts once."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    held: dict[int, int] = {}
    _storages(vars(optimizer), held, set())
    for t in (t for p in params for t in (p, p.grad) if t is not None):
        held.pop(t.untyped_storage().data_ptr(), None)
    return sum(held.values()) / sum(p.numel() for p in params)


class _Reads(TorchDispatchMode):
    """Counts the numbers that are read out of tensors: item, float(), bool()."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def _stepper(optimizer: torch.optim.Optimizer, device: str) -> Callable[[], Any]:
    """A step without arguments; those that ask for the loss get it."""
    if "loss" in inspect.signature(type(optimizer).step).parameters:
        return partial(optimizer.step, loss=torch.ones((), device=device))
    return optimizer.step


def _seconds(step: Callable[[], Any], device: str) -> float:
    """Wall time of a step; on a GPU of five in a row, so that their launch overlaps with their work, as in training."""
    if device == "cpu":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(5):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / 5


def _sizes(parameters: int, tensors: int) -> list[int]:
    return [parameters // tensors + (i < parameters % tensors) for i in range(tensors)]


def measure(
    names: Sequence[str] = (SUM, *CONTENDERS), *, parameters: int = 1_000_000, tensors: int = 1, rounds: int = 15, device: str = "cpu",
    progress: bool = False,
) -> list[Timing]:
    """Time single steps of the contenders on float32 parameters, in turns.

    Args:
        names: keys of `CONTENDERS`, and "sum".
        parameters: how many, in all.
        tensors: how many tensors they are split into, as evenly as possible.
        rounds: how often each contender steps, after two rounds to warm up.
        device: "cpu" or "cuda".
        progress: show a progress bar on standard error.

    Every contender has its own copy of the same parameters, and before each round gets the same gradients, whose sign changes
    from round to round so that no estimate of a distance runs away.

    Raises:
        ValueError: for an unknown name, or counts that make no sense.
        ImportError: if a package is not installed.
        FloatingPointError: if a contender's parameters are not finite at the end: then something else was timed.
    """
    for name in names:
        if name != SUM:
            _checked(name)
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, not {rounds}.")
    if not 1 <= tensors <= parameters:
        raise ValueError(f"tensors must be between 1 and the number of parameters, {parameters}, not {tensors}.")
    generator = torch.Generator().manual_seed(0)
    start, gradient = (scale * torch.randn(parameters, generator=generator).to(device) for scale in (0.1, 1e-3))
    steps: dict[str, Callable[[], Any]] = {}
    optimizers: dict[str, torch.optim.Optimizer] = {}
    gradients: list[Tensor] = []
    for name in names:
        if name == SUM:
            steps[name] = partial(start.clone().add_, gradient.clone(), alpha=2)
            continue
        grads = gradient.clone()
        params = [torch.nn.Parameter(part.clone()) for part in start.split(_sizes(parameters, tensors))]
        for p, part in zip(params, grads.split(_sizes(parameters, tensors)), strict=True):
            p.grad = part
        gradients.append(grads)
        optimizers[name] = make(name, params)
        steps[name] = _stepper(optimizers[name], device)

    times: dict[str, list[float]] = {name: [] for name in names}
    for k in _bar(range(rounds + WARM_UP), progress, f"{parameters:,} parameters, {tensors:,} tensors"):
        for grads in gradients:
            torch.mul(gradient, (-1) ** k, out=grads)
        for name in names:
            times[name].append(_seconds(steps[name], device))
    found = []
    for name in names:
        kept, reads = 0.0, _Reads()
        if name in optimizers:
            params = [p for group in optimizers[name].param_groups for p in group["params"]]
            if not all(bool(torch.isfinite(p).all()) for p in params):
                raise FloatingPointError(f"the parameters of {name} are no longer finite after {rounds} rounds.")
            kept = state_bytes(optimizers[name])
            with reads:
                steps[name]()
        found.append(Timing(name, tuple(times[name][WARM_UP:]), kept, reads.count))
    return found


def _bar(rounds: Iterable[int], progress: bool, what: str) -> Iterable[int]:
    if not progress:
        return rounds
    from tqdm import tqdm

    return tqdm(rounds, desc=what, unit="round", file=sys.stderr)


# --- recording --------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Recording:
    """What was measured on one machine.

    Attributes:
        environment: device, processor, threads, versions and commit.
        large: many parameters, so that memory is the limit.
        many: one total in more and more tensors.
        left_out: contenders that could not be had → why.
    """

    environment: dict[str, Any]
    large: Run | None = None
    many: tuple[Run, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)


def _environment(device: str) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "processor": experiments._processor(),
        "threads": torch.get_num_threads(), "python": platform.python_version(), "torch": torch.__version__,
        "commit": experiments._commit(),
    }


def save(recording: Recording, path: Path) -> None:
    """Write the `recording` to `path` as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(asdict(recording), indent=1, ensure_ascii=False)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".", suffix=".part", delete=False, encoding="utf-8") as f:
        f.write(text + "\n")
    os.chmod(f.name, 0o644)
    os.replace(f.name, path)


def load(path: Path) -> Recording:
    """Read a recording.

    Raises:
        ValueError: in one sentence that names the file, if it is missing, damaged or incomplete.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} is missing; make it with: {COMMAND} --output {path}")
    try:
        return _parsed(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        reason = f"there is no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise ValueError(
            f"{path} is not a complete recording of speeds ({reason}); make it again with: {COMMAND} --output {path}"
        ) from None


def _parsed(fields: dict) -> Recording:
    environment = fields["environment"]
    for key in ("device", "processor", "threads", "python", "torch", "commit"):
        environment[key]
    runs = [_run(of) for of in ([] if fields["large"] is None else [fields["large"]]) + fields["many"]]
    large, many = (None, runs) if fields["large"] is None else (runs[0], runs[1:])
    if large is not None and SUM not in {t.name for t in large.timings}:
        raise ValueError("the large run has no plain sum")
    return Recording(environment, large, tuple(many), dict(fields["left_out"]))


def _run(fields: dict) -> Run:
    timings = tuple(Timing(t["name"], tuple(t["seconds"]), t["state_bytes"], t["host_reads"]) for t in fields["timings"])
    names = [t.name for t in timings]
    unknown = sorted({*names} - {SUM, *CONTENDERS})
    if unknown:
        raise ValueError(f"there is no contender {unknown[0]!r}")
    if REFERENCE not in names:
        raise ValueError(f"a run has no timing of {REFERENCE!r}")
    if len({len(t.seconds) for t in timings}) != 1 or len(set(names)) != len(names):
        raise ValueError("the contenders have not stepped equally often")
    if not all(isinstance(s, float) and 0 < s < math.inf for t in timings for s in t.seconds):
        raise ValueError("a time is not a positive number")
    return Run(int(fields["parameters"]), int(fields["tensors"]), timings)


# --- the command line -------------------------------------------------------------------------------

def unavailable(names: Iterable[str], device: str) -> dict[str, str]:
    """Those contenders that cannot take two steps on a few parameters here → why, in one line."""
    found = {}
    for name in names:
        try:
            measure([name], parameters=100, tensors=2, rounds=1, device=device)
        except Exception as error:  # whatever it is, the others are to be measured
            found[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return found


def table(run: Run) -> str:
    """The run as text: the fastest first; ratios with their quartiles."""
    of, with_sum = ratios(run.timings), SUM in {t.name for t in run.timings}
    lines = [
        f"{run.parameters:,} parameters in {run.tensors:,} tensors, {len(run.timings[0].seconds)} rounds" + (
            f", plain sum {bandwidth(run) / 1e9:.1f} GB/s" if with_sum else ""),
        f"{'':36}{'ms':>9}  {'÷ fused AdamW':22}{'B moved':>8}{'share':>7}{'B state':>9}{'reads':>7}",
    ]
    for t in sorted(run.timings, key=lambda t: t.median):
        r = of[t.name]
        label = "y ← y + 2z" if t.name == SUM else CONTENDERS[t.name].label
        lines.append(
            f"{label:36}{1e3 * t.median:9.3f}  {f'{r.median:.2f} ({r.low:.2f} to {r.high:.2f})':22}{t.moved_bytes:8.1f}"
            + (f"{share(run, t.name):7.0%}" if with_sum else f"{'':7}") + f"{t.state_bytes:9.2f}{t.host_reads:7}"
        )
    return "\n".join(lines)


def _count(text: str) -> int:
    """"23.1M" → 23,100,000."""
    unit = {"k": 10**3, "M": 10**6, "G": 10**9}.get(text[-1:])
    try:
        value = Fraction(text[:-1]) * unit if unit else Fraction(text)
    except ValueError:
        value = Fraction(0)
    if value < 1 or value.denominator != 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of parameters such as 23.1M.")
    return int(value)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m pslib.speed", description="What a step of every optimizer costs, here and now.")
    parser.add_argument("--parameters", type=_count, help="how many (default: 23.1M, on a GPU 100M); of the large run")
    parser.add_argument("--tensors", type=int, default=1, help="how many tensors they are split into; of the large run")
    parser.add_argument("--threads", type=int, help="default: one a core")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--mode", choices=("large", "many", "both"), default="large", help="one large run, many tensors, or both")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"these contenders: {', '.join(CONTENDERS)}")
    parser.add_argument("--output", type=Path, help="write what was measured to this file (JSON)")
    args = parser.parse_args(argv)
    try:
        for name in args.only or ():
            _checked(name)
        if args.threads is not None and args.threads < 1:
            raise ValueError("--threads must be at least 1.")
        if args.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("there is no GPU here.")
        torch.set_num_threads(args.threads or os.cpu_count() or 1)
        chosen = list(dict.fromkeys([REFERENCE, *(args.only or CONTENDERS)]))
        left_out = unavailable(chosen, args.device)
        for name, reason in left_out.items():
            print(f"{name} is left out ({reason}).", file=sys.stderr)
        chosen = [name for name in chosen if name not in left_out]
        parameters = args.parameters or (100_000_000 if args.device == "cuda" else 23_100_000)
        how = {"rounds": args.rounds, "device": args.device, "progress": True}
        large, many = None, []
        if args.mode != "many":
            large = Run(parameters, args.tensors, tuple(measure([SUM, *chosen], parameters=parameters, tensors=args.tensors, **how)))
            print(table(large))
        for tensors in TENSORS if args.mode != "large" else ():
            names = [name for name in chosen if name in (args.only or MANY) or name == REFERENCE]
            many.append(Run(TOTAL, tensors, tuple(measure(names, parameters=TOTAL, tensors=tensors, **how))))
            print(table(many[-1]))
        if args.output is not None:
            save(Recording(_environment(args.device), large, tuple(many), left_out), args.output)
    except (ValueError, FloatingPointError, OSError) as error:
        print(f"pslib.speed: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
