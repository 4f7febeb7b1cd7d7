"""What a training step keeps in memory besides the weights: measured on tensors that have no data.

PyTorch's fake tensors go through every operation of a forward and a backward pass with their shape, type and
device alone: no memory, no arithmetic. Whoever counts the bytes of those alive at each moment knows what the
pass would need. What a library takes inside of an operation, and what Python itself does, is not in it.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ldm.device import DTYPES
from train.loop import Task


@runtime_checkable
class Rehearsed(Protocol):
    """A task that can say what its passes are like."""

    def rehearse(self, player: str, images: int) -> Tensor:
        """A scalar whose graph is that of the player's loss on so many images, of any content, without a look
        at data or at values: all tensors are fake."""
        ...


class Live(TorchDispatchMode):
    """Counts the bytes of the storages that operations inside the block made and that are still in use.

    before: tensors that are there already; a view of them is nothing new.
    """

    def __init__(self, before: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: weakref.WeakSet[Any] = weakref.WeakSet(t.untyped_storage() for t in before)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage: Any) -> None:
        if storage in self.known:
            return
        self.known.add(storage)
        weakref.finalize(storage, self.free, storage.nbytes())
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)

    def free(self, nbytes: int) -> None:
        self.now -= nbytes


def activations(task: Task, images: int) -> int | None:
    """Bytes that passes of `images` images need at most besides weights and gradients, None where the task
    cannot say; it stays as it is."""
    if not isinstance(task, Rehearsed):
        return None
    return max(passed(task, name, images) for name in task.players)


def passed(task: Any, name: str, images: int) -> int:
    """`activations` of one player."""
    run, device, player = task.config.run, task.device, task.players[name]
    modules = [value for value in vars(task).values() if isinstance(value, nn.Module)]
    with FakeTensorMode() as mode, faked([*modules, player.module], mode) as weights:
        for parameter in player.module.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
                weights.append(parameter.grad)
        with Live(weights) as live:
            with torch.autocast(device.type, dtype=DTYPES[run.precision], enabled=run.precision != "float32"):
                loss = task.rehearse(name, images)
            loss.backward()
        return live.peak


@contextmanager
def faked(modules: Iterable[nn.Module], mode: FakeTensorMode) -> Iterator[list[Tensor]]:
    """Inside the block parameters and buffers of these modules are fake, those given; tied ones stay tied."""
    places = {
        (id(table), name): (table, name, tensor)
        for module in modules
        for part in module.modules()
        for table in (part._parameters, part._buffers)
        for name, tensor in table.items()
        if tensor is not None
    }
    fakes = {id(tensor): mode.from_tensor(tensor) for _, _, tensor in places.values()}
    try:
        for table, name, tensor in places.values():
            table[name] = fakes[id(tensor)]  # type: ignore[assignment]
        yield list(fakes.values())
    finally:
        for table, name, tensor in places.values():
            table[name] = tensor  # type: ignore[assignment]
