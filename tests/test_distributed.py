"""Beyond one machine: shards and their sums, and DDP and FSDP2 against one process on the same global batch.

Ranks are processes on this machine: gloo on the CPU, and NCCL where there are as many GPUs.
"""

import contextlib
import functools
import io
import math
import multiprocessing
import os
import pickle
import re
import shlex
import subprocess
import sys
import tempfile
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from pslib import PSDASGD, PSSPS
from pslib.distributed import Sums, like, local, mean_loss, numel

ROOT = Path(__file__).parents[1]
LIMIT = 60  # seconds that a rank may wait for another


# --- ranks ------------------------------------------------------------------------------------------

class Ranks:
    """Processes that share one process group and run, all of them, what they are given."""

    def __init__(self, count: int, backend: str):
        context = multiprocessing.get_context("forkserver")
        # Imported once, not by each rank; the second is what an optimizer of torch imports when it is made.
        context.set_forkserver_preload(["torch.distributed.checkpoint.state_dict", "torch._dynamo", "torch.distributed.fsdp", "pslib"])
        self.folder = tempfile.TemporaryDirectory()
        self.pipes, self.processes = [], []
        for rank in range(count):
            here, there = context.Pipe()
            process = context.Process(target=serve, args=(rank, count, backend, f"{self.folder.name}/store", there), daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def __call__(self, work, *args, **settings) -> list:
        """What `work(...)` returned on each rank; the first failure of any rank ends them all."""
        for pipe in self.pipes:
            pipe.send_bytes(pickle.dumps((work, args, settings)))
        answers, waiting = {}, set(self.pipes)
        while waiting:
            ready = multiprocessing.connection.wait(waiting, timeout=2 * LIMIT)
            for pipe in ready:
                try:
                    failed, answer = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    failed, answer = True, "the process ended"
                if failed:
                    self.close()
                    pytest.fail(f"rank {self.pipes.index(pipe)}: {answer}")
                answers[pipe] = answer
                waiting.discard(pipe)
            if not ready:
                self.close()
                pytest.fail(f"ranks {[self.pipes.index(p) for p in waiting]} did not answer")
        return [answers[pipe] for pipe in self.pipes]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)


def serve(rank: int, count: int, backend: str, store: str, pipe) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=count, timeout=timedelta(seconds=LIMIT))
    while True:
        work, args, settings = pickle.loads(pipe.recv_bytes())
        try:
            answer = False, work(*args, **settings)
        except BaseException:
            answer = True, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(answer))


@pytest.fixture(scope="module")
def ranks_of():
    """ranks_of(count, backend): the same processes for every test, new ones after a failure."""
    started = {}

    def get(count, backend="gloo"):
        if (count, backend) not in started or not started[count, backend].alive:
            started[count, backend] = Ranks(count, backend)
        return started[count, backend]

    yield get
    for ranks in started.values():
        ranks.close()


def worlds(*counts):
    """(count, backend) of each world that this machine has."""
    return pytest.mark.parametrize("world", [
        pytest.param((count, backend), id=f"{count}-{backend}", marks=[] if backend == "gloo" else pytest.mark.skipif(
            not (dist.is_nccl_available() and torch.cuda.device_count() >= count), reason=f"needs {count} GPUs"))
        for backend in ("gloo", "nccl") for count in counts
    ])


def device() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def whole(t: torch.Tensor) -> torch.Tensor:
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().cpu()


# --- shards and sums --------------------------------------------------------------------------------

class Reads(TorchDispatchMode):
    """Counts what would make a GPU's step wait."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def counted(function):
    """What `function()` returns, the group sizes of its all-reduces, and its host reads."""
    sizes, plain = [], dist.all_reduce

    def all_reduce(tensor, op=dist.ReduceOp.SUM, group=None, async_op=False):
        sizes.append(dist.get_world_size(group))
        return plain(tensor, op, group, async_op)

    dist.all_reduce = all_reduce
    try:
        with Reads() as reads:
            answer = function()
    finally:
        dist.all_reduce = plain
    return answer, sizes, reads.count


def tensors(count: int) -> list[torch.Tensor]:
    """The same on every rank; 3 rows, so that four ranks share them unevenly."""
    g = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=g, dtype=torch.float64) for shape in [(3, 5), (8, 2, 3), (3,), (6, 4), (7,)][:count]]


def sharded(t: torch.Tensor, mesh, *placements) -> nn.Parameter:
    return nn.Parameter(distribute_tensor(t.to(device()), mesh, placements))


def moments(params) -> torch.Tensor:
    """Sums over this rank's shards: of squares and of ones."""
    shards = [local(p) for p in params]
    return torch.stack([torch.stack([s.square().sum(), torch.ones_like(s).sum()]) for s in shards])


def true_moments(values) -> torch.Tensor:
    return torch.tensor([[v.square().sum(), v.numel()] for v in values], dtype=torch.float64)


def close(a, b) -> bool:
    # At most 60 numbers are added, in two orders: 60 roundings of 2⁻⁵³ at the most.
    return torch.allclose(a, b, rtol=60 * 2.0**-53, atol=0)


def test_in_one_process_nothing_happens():
    p, sums, loss = nn.Parameter(torch.ones(2, 3)), torch.ones(1, 4, dtype=torch.float64), torch.tensor(3.0)
    state = torch.zeros(2, 3)
    (answers), sizes, reads = counted(lambda: (Sums([p])(sums), mean_loss(loss), local(p), like(p, state)))
    assert all(a is b for a, b in zip(answers, (sums, loss, p, state), strict=True)) and sizes == [] and reads == 0
    assert numel(p) == 6


def test_pslib_is_imported_without_the_module_of_dtensors_and_works_on_a_build_without_distributed():
    program = """
import sys, torch
torch.distributed.is_available = lambda: False
for name in ("is_initialized", "get_world_size", "all_reduce"):
    if hasattr(torch.distributed, name):
        delattr(torch.distributed, name)
import pslib
assert "torch.distributed.tensor" not in sys.modules
sys.modules["torch.distributed.tensor"] = None
x = torch.nn.Parameter(torch.ones(3))
for optimizer in (pslib.PSDASGD([x]), pslib.PSSPS([x])):
    x.grad = torch.ones(3)
    before = x.detach().clone()
    optimizer.step(**({"loss": x.sum()} if isinstance(optimizer, pslib.PSSPS) else {}))
    assert not torch.equal(before, x), optimizer
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def look_at_shards():
    mesh, answers = init_device_mesh(device(), (dist.get_world_size(),)), []
    for value in tensors(5):
        p = sharded(value, mesh, Shard(0))
        shard = local(p)
        assert not isinstance(shard, DTensor) and numel(p) == value.numel()
        shard.add_(dist.get_rank() + 1)  # in place, through the parameter
        narrow = torch.full_like(shard, dist.get_rank(), dtype=torch.float32)
        state, sizes, reads = counted(lambda p=p, narrow=narrow: like(p, narrow))
        assert (state.shape, state.stride(), state.placements, state.device_mesh) == (p.shape, p.stride(), p.placements, mesh)
        assert state.dtype == torch.float32 and not state.requires_grad and sizes == [] and reads == 0
        narrow.mul_(10)  # one storage
        assert torch.equal(local(state), narrow)
        answers.append((whole(p), whole(state), shard.numel()))
        with pytest.raises(ValueError, match="does not fit"):
            like(p, torch.zeros(99))
    return answers


@worlds(2, 4)
def test_a_shard_is_written_in_place_and_a_state_made_of_shards_has_the_parameters_layout(world, ranks_of):
    answers = ranks_of(*world)(look_at_shards)
    count = world[0]
    for i, value in enumerate(tensors(5)):
        rank_of_row = torch.cat([torch.full((len(c),), r) for r, c in enumerate(value.chunk(count))])
        rows = rank_of_row.reshape(-1, *[1] * (value.dim() - 1)).expand_as(value)
        for rank in range(count):
            assert torch.equal(answers[rank][i][0], value + (rows + 1))
            assert torch.equal(answers[rank][i][1], 10.0 * rows)
    if count == 4:
        assert answers[3][0][2] == 0  # a rank without a single coordinate took part


def gradient_of_another_layout():
    mesh = init_device_mesh(device(), (dist.get_world_size(),))
    p = sharded(torch.zeros(3, 2, dtype=torch.float64), mesh, Shard(0))
    ones = torch.ones(3, 2, dtype=torch.float64, device=device())
    p.grad = DTensor.from_local(ones, mesh, [Partial()])
    shard = local(p.grad, p)
    assert shard.shape == local(p).shape and type(shard) is torch.Tensor
    return (shard == dist.get_world_size()).all().item(), shard.numel()


@worlds(2, 4)
def test_a_gradient_whose_sum_is_pending_is_added_up_and_laid_out_as_its_parameter(world, ranks_of):
    answers = ranks_of(*world)(gradient_of_another_layout)
    assert all(same for same, _ in answers) and sum(n for _, n in answers) == 6


def sums_on_a_line():
    count = dist.get_world_size()
    mesh = init_device_mesh(device(), (count,))
    values = tensors(5)
    params = [
        sharded(values[0], mesh, Shard(0)), nn.Parameter(values[1].to(device())), sharded(values[2], mesh, Replicate()),
        sharded(values[3], mesh, Shard(1)), sharded(values[4], mesh, Shard(0)),
    ]
    sums, sizes, reads = counted(lambda: Sums(params)(moments(params)))
    assert sizes == [count] and reads == 0, (sizes, reads)
    same, sizes, _ = counted(lambda: Sums(params[1:3])(moments(params[1:3])))
    assert sizes == []
    everything = Sums([params[0], params[3]])(moments([params[0], params[3]]))
    return sums.cpu(), same.cpu(), everything.cpu()


@worlds(2, 4)
def test_rows_of_sharded_parameters_are_added_up_in_one_reduction_and_others_left_alone(world, ranks_of):
    answers = ranks_of(*world)(sums_on_a_line)
    true = true_moments(tensors(5))
    for sums, same, everything in answers:
        assert close(sums, true) and torch.equal(same, true[1:3]) and close(everything, true[[0, 3]])
        assert torch.equal(sums, answers[0][0])  # the same bits everywhere, or ranks would drift apart


def sums_on_a_plane():
    mesh = init_device_mesh(device(), (2, 2), mesh_dim_names=("replicate", "shard"))
    values = tensors(5)
    params = [
        sharded(values[0], mesh, Replicate(), Shard(0)),  # hybrid sharding
        sharded(values[1], mesh, Shard(0), Shard(1)),  # sharded twice
        nn.Parameter(values[2].to(device())),
        sharded(values[3], mesh, Shard(0), Shard(0)),
        sharded(values[4], mesh, Shard(0), Replicate()),
    ]
    one = init_device_mesh(device(), (4, 1))
    params.append(sharded(values[3], one, Replicate(), Shard(0)))  # a mesh with one rank a row: nothing to add
    sums, sizes, reads = counted(lambda: Sums(params)(moments(params)))
    assert sizes == [2, 2] and reads == 0, (sizes, reads)
    hybrid, sizes, _ = counted(lambda: Sums(params[:1])(moments(params[:1])))
    assert sizes == [2]
    # A network wrapped for data and tensor parallelism: FSDP2's own placement where both shard one dimension.
    plane = init_device_mesh(device(), (2, 2), mesh_dim_names=("data", "tensor"))
    layer = nn.Linear(4, 6, bias=False, device=device(), dtype=torch.float64)
    layer.weight = sharded(values[3], plane["tensor"], Shard(0))
    fully_shard(layer, mesh=plane["data"])
    both = Sums([layer.weight])(moments([layer.weight]))
    return sums.cpu(), hybrid.cpu(), both.cpu()


@worlds(4)
def test_on_a_mesh_sums_run_over_the_dimensions_that_shard_once_for_each_group(world, ranks_of):
    answers = ranks_of(*world)(sums_on_a_plane)
    true = true_moments([*tensors(5), tensors(4)[3]])
    for sums, hybrid, both in answers:
        assert close(sums, true) and close(hybrid, true[:1]) and close(both, true[3:4])
        assert torch.equal(sums, answers[0][0])


def refused():
    mesh = init_device_mesh(device(), (dist.get_world_size(),))
    with pytest.raises(ValueError, match="Partial"):
        Sums([DTensor.from_local(torch.ones(2, device=device()), mesh, [Partial()])])
    for settings in ({"units": "neuron"}, {"slice_p": 11}):
        p = sharded(torch.ones(64, 4), mesh, Shard(0))
        p.grad = torch.ones_like(p)
        with pytest.raises(ValueError, match=next(iter(settings))):
            PSDASGD([p], **settings).step()
        assert torch.equal(whole(p), torch.ones(64, 4))


@worlds(2)
def test_what_depends_on_where_a_tensor_is_cut_is_refused(world, ranks_of):
    ranks_of(*world)(refused)


def means():
    rank = dist.get_rank()
    loss = torch.tensor(1.0 + rank, device=device(), requires_grad=True)
    mean, sizes, reads = counted(lambda: mean_loss(loss))
    assert sizes == [dist.get_world_size()] and reads == 0 and loss.item() == 1 + rank and not mean.requires_grad
    bad = mean_loss(torch.tensor(float("nan") if rank == 1 else 1.0, device=device(), dtype=torch.float64))
    mesh = init_device_mesh(device(), (dist.get_world_size(),))
    pending = mean_loss(DTensor.from_local(torch.tensor(1.0, device=device()), mesh, [Partial()]))
    return mean.cpu(), bad.cpu(), pending.cpu()


@worlds(2, 4)
def test_the_loss_is_the_mean_over_ranks_and_not_finite_if_one_is_not(world, ranks_of):
    count = world[0]
    for mean, bad, pending in ranks_of(*world)(means):
        assert torch.equal(mean, torch.tensor((count + 1) / 2, dtype=torch.float64)) and bad.isnan() and pending == count


# --- training ---------------------------------------------------------------------------------------

METHODS = {
    "tensor": (PSDASGD, {}),
    "model": (PSDASGD, {"per": "model", "d0": 1e-3}),
    "units": (PSDASGD, {"per": "model", "units": "tensor"}),
    "sps": (PSSPS, {"c": 1.0, "d0": 0.1, "growth_rate": math.inf}),  # bounded at the first step only, so that the loss sets the others
}
FUSED = pytest.mark.parametrize("fused", [False, True], ids=["reference", "fused"])
STEPS = 10

# slice_p stays 1: which coordinates a slice holds would depend on where a tensor is cut, and for shards it is refused.
# The only difference between one process and several is the order in which numbers are added.  Gradients changed by as much
# as that can, 24 roundings of 2⁻⁵² each, in the first step of one process, change the end of this training by at most 1e-14.
TOLERANCE = 1e-12


class Net(nn.Module):
    """Three rows, which four ranks share unevenly; a parameter that nothing uses; and one that starts at zero and joins late."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(1)
        self.first, self.second, self.third = (nn.Linear(*io, dtype=torch.float64) for io in [(5, 3), (3, 6), (6, 1)])
        self.unused = nn.Parameter(torch.ones(4, 2, dtype=torch.float64))
        self.late = nn.Parameter(torch.zeros(6, dtype=torch.float64))
        with torch.no_grad():
            for layer in (self.first, self.second, self.third):
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=g, dtype=torch.float64) / layer.in_features**0.5)
                layer.bias.copy_(torch.randn(layer.bias.shape, generator=g, dtype=torch.float64))

    def forward(self, x, step):
        hidden = torch.tanh(self.second(torch.tanh(self.first(x))))
        return self.third(hidden + self.late if step >= 3 else hidden)


def wrapped(kind: str) -> nn.Module:
    """The network as it is trained.

    "one" process, "ddp", "fsdp", "hybrid" sharding, "mixed" plain and sharded tensors, or "parallel" tensors, for which every
    rank sees the whole batch.
    """
    where = "cpu" if kind == "one" else device()
    net = Net().to(where)
    if kind == "ddp":
        return DistributedDataParallel(net, find_unused_parameters=True)
    if kind == "parallel":
        plan = {"first": RowwiseParallel(input_layouts=Replicate()), "second": ColwiseParallel(output_layouts=Replicate())}
        parallelize_module(net, init_device_mesh(where, (dist.get_world_size(),)), plan)
    if kind in ("fsdp", "hybrid", "mixed"):
        count = dist.get_world_size()
        shape, names = ((2, count // 2), ("replicate", "shard")) if kind == "hybrid" else ((count,), None)
        mesh = init_device_mesh(where, shape, mesh_dim_names=names)
        for layer in (net.first, net.second):
            fully_shard(layer, mesh=mesh)
        if kind != "mixed":
            fully_shard(net, mesh=mesh)
    return net


def batch(step: int, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's share of the global batch; the shares differ in scale, so that each rank has another loss."""
    g = torch.Generator().manual_seed(step)
    x = torch.randn(24, 5, generator=g, dtype=torch.float64) * torch.linspace(0.5, 2, 24, dtype=torch.float64)[:, None]
    y = x.sum(1, keepdim=True).sin() + x[:, :1]
    if kind in ("one", "parallel"):
        where = "cpu" if kind == "one" else device()
        return x.to(where), y.to(where)
    rank, count = dist.get_rank(), dist.get_world_size()
    return x.chunk(count)[rank].to(device()), y.chunk(count)[rank].to(device())


def optimizer_of(method: str, fused: bool, net: nn.Module):
    optimizer, settings = METHODS[method]
    return optimizer(net.parameters(), weight_decay=1e-3, fused=fused, **settings)


def plain_names(net: nn.Module) -> dict[str, nn.Parameter]:
    return {name.removeprefix("module."): p for name, p in net.named_parameters()}


def spoilt(how: str | None, kind: str, step: int, x, params, loss):
    """Something that is not finite, on one rank only: a sample of the batch, the gradient in a shard, or the loss."""
    if how is not None and step == 5 and (kind == "one" or dist.get_rank() == dist.get_world_size() - 2):
        if how == "sample" and loss is None:
            x[0, 0] = math.nan
        if how == "shard" and loss is not None:
            local(params["second.weight"].grad)[0, 0] = math.inf
        if how == "loss" and loss is not None:
            loss = loss * math.nan
    return loss


def train(kind: str, method: str, fused: bool, steps=range(STEPS), *, how=None, before=None, after=None) -> dict:
    """Train, and return the distances after every step, the losses on this rank, and the whole parameters at the end.

    Args:
        kind, method, fused: what is trained, and how.
        steps: the numbers of the steps.
        how: what is spoilt in step 5, see `spoilt`.
        before, after: called with network and optimizer, to load and to keep their states.
    """
    warnings.filterwarnings("ignore", ".*not finite")
    net = wrapped(kind)
    opt = optimizer_of(method, fused, net)
    if before is not None:
        before(net, opt)
    distances, losses = [], []
    for step in steps:
        opt.zero_grad()
        x, y = batch(step, kind)
        spoilt(how, kind, step, x, None, None)
        loss = (net(x, step) - y).square().mean()
        loss.backward()
        if kind == "mixed":
            for p in net.parameters():
                if p.grad is not None and not isinstance(p.grad, DTensor):
                    dist.all_reduce(p.grad)
                    p.grad /= dist.get_world_size()
        loss = spoilt(how, kind, step, x, plain_names(net), loss)
        opt.step(**({"loss": loss} if isinstance(opt, PSSPS) else {}))
        distances.append(opt.distance.cpu())
        losses.append(loss.item())
    assert opt.fused is fused
    kept = after(net, opt) if after is not None else None
    params = {name: whole(p) for name, p in plain_names(net).items()}
    return {"params": params, "distances": torch.stack(distances), "losses": losses, "skipped": opt.skipped_steps, "kept": kept}


def assert_same(one: dict, many: list[dict], since: int = 0) -> None:
    """Every rank ended where one process did, and all ranks on the same bits.

    Args:
        one, many: what `train` returned in one process, and on every rank.
        since: the step with which `many` began, from a checkpoint.
    """
    distances, losses = one["distances"][since:], torch.tensor(one["losses"][since:], dtype=torch.float64)
    for other in many:
        for name, p in one["params"].items():
            assert torch.allclose(other["params"][name], p, rtol=TOLERANCE, atol=TOLERANCE), name
            assert torch.equal(other["params"][name], many[0]["params"][name]), name
        # Loading makes a state, which says nothing, for parameters that had none.
        learned = other["distances"] if since == 0 else torch.where(distances.isnan(), math.nan, other["distances"])
        assert torch.allclose(learned, distances, rtol=TOLERANCE, atol=0, equal_nan=True)
        assert torch.equal(other["distances"].nan_to_num(), many[0]["distances"].nan_to_num())
        assert other["skipped"] == one["skipped"]
    mean = torch.tensor([other["losses"] for other in many], dtype=torch.float64).mean(0)
    assert torch.allclose(mean, losses, rtol=TOLERANCE, atol=0, equal_nan=True)


KINDS = [(2, "ddp"), (4, "ddp"), (2, "fsdp"), (4, "fsdp"), (4, "hybrid"), (2, "mixed"), (2, "parallel")]


def worlds_of(kinds):
    """(count, backend, kind) of each world that this machine has."""
    marks = [m for count, _ in kinds for m in worlds(count).args[1]]
    return pytest.mark.parametrize("world", [
        pytest.param((*m.values[0], kind), id=f"{kind}-{m.id}", marks=m.marks)
        for m, kind in zip(marks, (kind for _, kind in kinds for _ in range(2)), strict=True)
    ])


@worlds_of(KINDS)
@FUSED
@pytest.mark.parametrize("method", METHODS)
def test_ranks_follow_one_process_on_the_same_global_batch(world, fused, method, ranks_of):
    count, backend, kind = world
    many = ranks_of(count, backend)(train, kind, method, fused)
    one = train("one", method, fused)
    assert_same(one, many)
    assert len({other["losses"][0] for other in many}) == (1 if kind == "parallel" else count)  # their mean matters
    moved = [not torch.equal(p, q) for p, q in zip(one["params"].values(), Net().parameters(), strict=True)]
    assert moved == [name != "unused" for name in one["params"]]


SPOILT = [("tensor", "sample"), ("sps", "sample"), ("sps", "loss"), ("model", "shard"), ("sps", "shard")]


@worlds_of([(2, "ddp"), (4, "fsdp"), (2, "mixed")])
@FUSED
@pytest.mark.parametrize("method, how", SPOILT)
def test_what_is_not_finite_on_one_rank_makes_all_ranks_skip_the_step(world, fused, method, how, ranks_of):
    count, backend, kind = world
    if (kind, how) == ("ddp", "shard"):
        pytest.skip("under DDP there are no shards")
    many = ranks_of(count, backend)(train, kind, method, fused, how=how)
    one = train("one", method, fused, how=how)
    assert one["skipped"] == 1
    assert_same(one, many)


# --- checkpoints ------------------------------------------------------------------------------------

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)


def states_of(net, opt):
    return get_state_dict(net, opt, options=WHOLE)


def loader(states, net, opt):
    set_state_dict(net, opt, model_state_dict=states[0], optim_state_dict=states[1], options=WHOLE)


@worlds(2)
@FUSED
@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_on_from_whole_states_in_one_process_and_from_one_process_on_shards(world, fused, method, ranks_of):
    """And on the other path: the fast one if the states are the reference loop's, and the other way round."""
    half, one = STEPS // 2, train("one", method, fused)
    states = ranks_of(*world)(train, "fsdp", method, fused, range(half), after=states_of)[0]["kept"]
    assert_same(one, [train("one", method, not fused, range(half, STEPS), before=functools.partial(loader, states))], half)
    states = train("one", method, fused, range(half), after=states_of)["kept"]
    assert_same(one, ranks_of(*world)(train, "fsdp", method, not fused, range(half, STEPS), before=functools.partial(loader, states)), half)


def save(folder, net, opt):
    net.unused.requires_grad_(False)  # with states for some parameters only, torch's Adam cannot do this either
    model, state = get_state_dict(net, opt)
    checkpoint.save({"model": model, "optimizer": state}, checkpoint_id=folder)


def load(folder, net, opt):
    net.unused.requires_grad_(False)
    model, state = get_state_dict(net, opt)
    checkpoint.load({"model": model, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(net, opt, model_state_dict=model, optim_state_dict=state)


@worlds(4)
@FUSED
@pytest.mark.parametrize("method", METHODS)
def test_shards_saved_by_two_ranks_are_read_by_four(world, fused, method, ranks_of, tmp_path):
    half = STEPS // 2
    ranks_of(2, world[1])(train, "fsdp", method, fused, range(half), after=functools.partial(save, tmp_path))
    ends = ranks_of(*world)(train, "fsdp", method, fused, range(half, STEPS), before=functools.partial(load, tmp_path))
    assert_same(train("one", method, fused), ends, half)


# --- the page ---------------------------------------------------------------------------------------

def section() -> str:
    page = (ROOT / "book" / "api.md").read_text(encoding="utf-8")
    found = re.search(r"^## Beyond one machine\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    assert found, "book/api.md has no section 'Beyond one machine'"
    return found[1]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", section(), re.MULTILINE | re.DOTALL)


def changed(program: str, diff: str) -> str:
    """The program with a diff of the page applied; a line that replaces none is an import."""
    old = None
    for line in diff.splitlines():
        if line[0] == "-":
            old = line[2:]
        elif old is None:
            program = program.replace("import pslib\n", f"{line[2:]}\nimport pslib\n")
        else:
            assert program.count(old) == 1, old
            program, old = program.replace(old, line[2:]), None
    return program


def run_here(program: str) -> list[float]:
    """Run the program in this rank, in the process group that there is."""
    rank, count = dist.get_rank(), dist.get_world_size()
    printed, begin, end = io.StringIO(), dist.init_process_group, dist.destroy_process_group
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(count))
    dist.init_process_group = dist.destroy_process_group = lambda *args: None
    try:
        with contextlib.redirect_stdout(printed):
            exec(program, {"__name__": "__main__"})
    finally:
        dist.init_process_group, dist.destroy_process_group = begin, end
    return numbers(printed.getvalue()) if rank == 0 else []


def numbers(printed: str) -> list[float]:
    assert printed.startswith("distance "), printed
    return [float(d) for d in printed.split()[1:]]


@pytest.mark.skipif(os.name != "posix", reason="needs torchrun on the path")
def test_the_pages_example_runs_as_written_and_learns_what_one_process_learns(ranks_of, tmp_path):
    (program,), (command,) = blocks("python"), blocks("console")
    assert len(program.splitlines()) <= 45
    (tmp_path / "train.py").write_text(program)
    words = shlex.split(command.removeprefix("$ "))
    assert words[0] == "torchrun" and words[-1] == "train.py" and "2" in words
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(words, check=False, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    distances = numbers(ran.stdout)
    # Three digits are printed, and in float32 the order of additions is below them.
    alone = ranks_of(1)(run_here, program)[0]
    assert len(distances) == 4 and distances == pytest.approx(alone, rel=0.02)
    start = [2.0**-8 / math.sqrt(3 * n) for n in (4, 4, 32, 32)]  # d0 times what PyTorch's layers start with
    assert all(d > 3 * first for d, first in zip(distances, start, strict=True))


@pytest.mark.parametrize("sps", [False, True], ids=["PS-DA-SGD", "PS-SPS"])
def test_the_lines_that_the_page_changes_for_fsdp2_and_for_ps_sps_give_what_one_process_gives(sps, ranks_of):
    (program,), (sharding, polyak) = blocks("python"), blocks("diff")
    program = changed(program, polyak) if sps else program
    assert ("PSSPS" in program) == sps and "fully_shard" not in program
    alone = ranks_of(1)(run_here, program)[0]
    assert "model = fully_shard(model)" in changed(program, sharding)
    shards = ranks_of(2)(run_here, changed(program, sharding))[0]
    assert len(alone) == (1 if sps else 4) and shards == pytest.approx(alone, rel=0.02) and min(alone) > 0
