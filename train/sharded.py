"""Weights, gradients, optimiser and moving average in pieces, one with each process: `run.parallel: fsdp`.

FSDP2 of torch (`fully_shard`; the idea: Rajbhandari et al. 2020, ZeRO, arXiv:1910.02054, stage 3). A block's
weights are whole only while it computes, its gradients are averaged and cut up as soon as they are there. So
the processes compute everything together, validation and previews included. Each saves its own pieces
(`pieces.py`), and states go on with `ddp`, in one process, and with another number of them.

A network is built whole by every process, on the CPU, as in any run and so with the same weights; a process
keeps its pieces alone, and moves them to its device. It is whole again only where it is exported: in rank 0,
on the CPU. What is cut up is a `DTensor`; outside of this file it is handled by `whole`, `piece_like` and
`tensors` alone.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from ldm.device import pick_device
from ldm.distributed import is_first, world_size
from train.recompute import BLOCKS

if TYPE_CHECKING:
    from train.loop import RunConfig, Task


def building_device(run: "RunConfig") -> torch.device:
    """Where a network is built: one that will be cut up on the CPU, as it may not fit where it will run."""
    in_pieces = run.parallel == "fsdp" and world_size() > 1
    return torch.device("cpu") if in_pieces else pick_device(run.device)


def shard(network: nn.Module, device: torch.device) -> None:
    """Cut `network` up, every block for itself, in place; its parameters are others afterwards, on `device`.

    Its `state_dict` is whole in rank 0, on the CPU: all processes must ask for it together.
    """
    mesh = init_device_mesh(device.type, (world_size(),))
    for parameter in network.parameters():
        parameter.data = parameter.data.contiguous()  # FSDP2 takes no other layout, such as channels-last
    for block in network.modules():
        if isinstance(block, BLOCKS) and block is not network:
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(network, mesh=mesh, reshard_after_forward=True)
    for name in getattr(network, "OTHER_FORWARDS", ()):  # they use the network's weights too
        register_fsdp_forward_method(network, name)
    network.register_state_dict_post_hook(make_whole)


def shard_all(task: "Task") -> None:
    """Cut up the networks that the task names in `sharded`: those whose `forward` it calls."""
    for network in getattr(task, "sharded", ()):
        shard(network, pick_device(task.config.run.device))
    for player in task.players.values():
        player.find_parameters()
        assert is_sharded(player.module), "a task that allows fsdp names all its networks"


def make_whole(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """A hook of `state_dict`. Processes that write nothing have zeros, which take no memory."""
    for name, value in state.items():
        if name.startswith(prefix) and isinstance(value, DTensor):
            full = whole(value)
            state[name] = full.cpu() if is_first() else torch.zeros((), dtype=value.dtype).expand(value.shape)


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """What `state_dict` names, each as this process holds it: whole, or a piece; they may be written to."""
    if not is_sharded(module):
        return dict(module.state_dict())
    found = {}
    for place, part in module.named_modules(remove_duplicate=False):
        lasting = {k: b for k, b in part._buffers.items() if k not in part._non_persistent_buffers_set}
        for name, tensor in {**part._parameters, **lasting}.items():
            if tensor is not None:
                found[f"{place}.{name}" if place else name] = tensor.detach()
    return found


def is_sharded(module: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def whole(tensor: Tensor) -> Tensor:
    """The tensor of which each process has a piece: all of them must ask. Others are whole as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_piece(tensor: Tensor) -> Tensor:
    """What this process holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def piece_like(tensor: Tensor, value: Tensor) -> Tensor:
    """`value`, cut up as `tensor` is; itself where that is whole, or of another shape (a count of steps)."""
    if not isinstance(tensor, DTensor) or isinstance(value, DTensor) or value.shape != tensor.shape:
        return value
    return distribute_tensor(
        value.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None
    )
