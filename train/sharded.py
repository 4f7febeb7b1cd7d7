"""Weights, gradients, optimiser and moving average in pieces, one with each process: `run.parallel: fsdp`.

FSDP2 of torch (`fully_shard`; the idea: Rajbhandari et al. 2020, ZeRO, arXiv:1910.02054, stage 3). A block's
weights are whole only while it computes, its gradients are averaged and cut up as soon as they are there. So
the processes compute everything together, validation, previews and the state to be saved included, and only
the writing is left to rank 0. The files are those of any run: states go on with `ddp`, and in one process.

What is cut up is a `DTensor`; outside of this file it is handled by `whole`, `piece_like` and `load` alone.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ldm.weights.io import load_strict
from train.distributed import world_size
from train.recompute import BLOCKS

if TYPE_CHECKING:
    from train.loop import Task


def shard(network: nn.Module) -> None:
    """Cut `network` up, every block for itself, in place; its parameters are others afterwards.

    Its `state_dict` is whole, on the CPU: all processes must ask for it together.
    """
    device = next(network.parameters()).device
    mesh = init_device_mesh(device.type, (world_size(),))
    for block in network.modules():
        if isinstance(block, BLOCKS) and block is not network:
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(network, mesh=mesh, reshard_after_forward=True)
    network.register_state_dict_post_hook(make_whole)


def shard_all(task: "Task") -> None:
    """Cut up the networks that the task names in `sharded`: those whose `forward` it calls."""
    for network in getattr(task, "sharded", ()):
        shard(network)
    for player in task.players.values():
        player.find_parameters()
        assert is_sharded(player.module), "a task that allows fsdp names all its networks"


def make_whole(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name, value in state.items():
        if name.startswith(prefix) and isinstance(value, DTensor):
            state[name] = whole(value).cpu()


def is_sharded(module: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def whole(tensor: Tensor) -> Tensor:
    """The tensor of which each process has a piece: all of them must ask. Others are whole as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def piece_like(tensor: Tensor, value: Tensor) -> Tensor:
    """`value`, cut up as `tensor` is; itself where that is whole, or of another shape (a count of steps)."""
    if not isinstance(tensor, DTensor) or value.shape != tensor.shape:
        return value
    return distribute_tensor(
        value.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None
    )


@torch.no_grad()
def load(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """`load_strict`, also into a module that is cut up."""
    if not is_sharded(module):
        load_strict(module, dict(tensors), source)
        return
    own = {**dict(module.named_buffers()), **dict(module.named_parameters())}
    persistent = module.state_dict().keys()
    if persistent != tensors.keys():
        raise ValueError(f"{source} has other weights: {sorted(persistent ^ tensors.keys())[:5]}")
    for name in persistent:
        own[name].copy_(piece_like(own[name], tensors[name]))
