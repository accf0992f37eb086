"""What the optimizers need beyond one process: shards of tensors, sums over them, and the mean loss.

Under DDP every rank holds whole parameters and the same averaged gradients, so that every rank computes the same step.
Under FSDP2 and tensor parallelism a parameter is a `DTensor`: each rank works on its shard alone, and only the sums over
blocks travel, in one all-reduce for each process group.  Everything here does nothing in one process.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs

__all__ = ["Sums", "like", "local", "mean_loss", "numel"]


def _is_dtensor(t: Tensor) -> TypeIs[DTensor]:
    """Whether t is a DTensor: nobody has one before its module is imported, which some builds of torch do not have."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


@torch.no_grad()
def local(t: Tensor, owner: Tensor | None = None) -> Tensor:
    """This rank's shard of a DTensor, on the same storage and writable in place; any other tensor as it is.

    Args:
        t: a parameter, its gradient, or a tensor of its state.
        owner: the parameter that t is the gradient of.  A gradient that is laid out in another way, such as one whose sum
            over ranks is pending, is first laid out as the parameter is.

    >>> x = torch.ones(2)
    >>> local(x) is x
    True
    """
    if not _is_dtensor(t):
        return t
    if owner is not None and _is_dtensor(owner) and t.placements != owner.placements:
        t = t.redistribute(owner.device_mesh, owner.placements)
    shard = t.to_local()
    # The result of a collective still under way is another kind of tensor, which has no memory of its own yet.
    return shard.wait() if hasattr(shard, "wait") else shard


@torch.no_grad()
def like(p: Tensor, shard: Tensor) -> Tensor:
    """A tensor of p's state, on the storage of `shard`: a DTensor laid out as p if p is one, else `shard` itself.

    Args:
        p: the parameter.
        shard: shaped like `local(p)`, of any dtype.  Nothing is communicated, and the device is that of the shard, which
            under CPU offloading is not the mesh's.

    Raises:
        ValueError: if the shapes differ.

    >>> shard = torch.zeros(2)
    >>> like(torch.ones(2), shard) is shard
    True
    """
    if not _is_dtensor(p):
        return shard
    state = torch.empty_like(p, dtype=shard.dtype, device=shard.device, requires_grad=False)
    empty = local(state)
    if empty.shape != shard.shape:
        raise ValueError(f"a state of shape {tuple(shard.shape)} does not fit a shard of shape {tuple(empty.shape)}.")
    empty.set_(shard.untyped_storage(), shard.storage_offset(), shard.shape, shard.stride())
    return state


def numel(p: Tensor) -> int:
    """How many coordinates the whole tensor has, over all ranks.

    Args:
        p: a parameter.

    >>> numel(torch.ones(2, 3))
    6
    """
    return p.numel()


class Sums:
    """Sums over whole parameters from sums over shards.

    Args:
        params: the parameters, in the same order on every rank.

    Raises:
        ValueError: for a parameter whose sum over ranks is pending (`Partial`).

    >>> Sums([torch.ones(2), torch.ones(3)])(torch.tensor([[2.0], [3.0]])).tolist()
    [[2.0], [3.0]]
    """

    def __init__(self, params: list[Tensor]):
        self._rows = len(params)
        self._reductions: dict[str, tuple[ProcessGroup, list[list[int]]]] = {}
        for row, p in enumerate(params):
            if not _is_dtensor(p):
                continue
            for dim, placement in enumerate(p.placements):
                if placement.is_partial():
                    raise ValueError("a parameter with a Partial placement has no values to optimize; redistribute it first.")
                if placement.is_replicate() or p.device_mesh.size(dim) == 1:
                    continue
                group = p.device_mesh.get_group(dim)
                runs = self._reductions.setdefault(group.group_name, (group, []))[1]
                if runs and runs[-1][1] == row:
                    runs[-1][1] = row + 1
                elif not runs or runs[-1][1] < row:
                    runs.append([row, row + 1])

    @torch.no_grad()
    def __call__(self, sums: Tensor) -> Tensor:
        """Add up over the ranks that share the shards, in one all-reduce for each process group; no host reads.

        Every rank has to call this, with or without gradients and coordinates of its own.

        Args:
            sums: [parameters, anything], this rank's sums, one row a parameter.

        Returns:
            The sums over whole parameters, the same bits on every rank.
        """
        # Rows are taken by slices, not by an index: an index would have to be copied to the device.
        for group, runs in self._reductions.values():
            part = torch.cat([sums[a:b] for a, b in runs])
            torch.distributed.all_reduce(part, group=group)
            if len(part) == self._rows:
                sums = part
                continue
            sums = sums.clone()
            for (a, b), piece in zip(runs, torch.split(part, [b - a for a, b in runs]), strict=True):
                sums[a:b] = piece
        return sums


@torch.no_grad()
def mean_loss(loss: Tensor) -> Tensor:
    """The mean of the loss over all ranks as a lazy float64 scalar; the loss itself where there is one process.

    Each rank sees its share of the batch, so that without this PS-SPS would take another step on each.  The loss has to be
    on a device that the default process group serves.

    >>> mean_loss(torch.tensor(2.0))
    tensor(2.)
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return loss
    ranks = torch.distributed.get_world_size()
    if ranks == 1:
        return loss
    mean = local(loss.full_tensor() if _is_dtensor(loss) else loss).to(torch.float64, copy=True)
    torch.distributed.all_reduce(mean)
    return mean / ranks
