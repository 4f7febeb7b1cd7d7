"""Training by several processes at once (`ldm/distributed.py`); the loop is the same for one and for many.

Each process of `torchrun --nproc-per-node N -m train TASK CONFIG` has a copy of the model. The parts of a
step's batch are what they share out: a batch has `run.accumulate` x N parts, rank r takes parts r, r + N, ...
one after the other, and the gradients are averaged over all. Noise, timesteps and dropout are functions of
(seed, step, part) and data of (seed, step): 1 process with accumulate 4, 2 with 2 and 4 with 1 are the same
run, up to the order of float32 sums, and go on from each other's states. Rank 0 alone logs, validates and
writes; where a process is gone, the run goes on with --resume.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ldm.distributed import connected, gather, is_first, rank, together, world_size

BUCKET = 2**24  # values averaged at once: 64 MiB in float32
LOST = "What is saved is whole: start all processes again, with --resume"


def parts_of(accumulate: int) -> int:
    """In how many parts a batch is computed: `run.accumulate` by each process."""
    return accumulate * world_size()


def own_parts(accumulate: int) -> range:
    """The parts of a batch that are this process's."""
    return range(rank(), parts_of(accumulate), world_size())


def require_whole_parts(batch: int, accumulate: int) -> None:
    if batch % parts_of(accumulate):
        raise ValueError(
            f"run.batch {batch} must be a multiple of run.accumulate {accumulate} times the number of "
            f"processes {world_size()}"
        )


def require_same(config: Mapping[str, Any], differences: Callable[[Any, Any], list[str]]) -> None:
    """Raises ValueError (as `together` does) where another process was started with other values."""
    configs = gather(config)
    with together():
        for other, theirs in enumerate(configs):
            if lines := differences(configs[0], theirs):
                raise ValueError(
                    f"the processes of this job were started with different values; rank 0 and rank {other}: "
                    f"{'; '.join(lines)}; give all of them the same"
                )


@contextmanager
def own(folder: Path) -> Iterator[Path]:
    """The folder for rank 0, and a scratch folder for any other: what they compute together, one writes."""
    if is_first():
        yield folder
        return
    with TemporaryDirectory() as scratch:
        yield Path(scratch)


# --- numbers ------------------------------------------------------------------------------------------------


def means(metrics: Mapping[str, float]) -> dict[str, float]:
    """Of each metric over the processes; one that only some have counts as 0 for the others."""
    everybodys = gather(dict(metrics))
    names = list(dict.fromkeys(name for theirs in everybodys for name in theirs))
    return {name: sum(theirs.get(name, 0.0) for theirs in everybodys) / len(everybodys) for name in names}


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """The mean of every gradient over the processes; where only some have one, it is 0 for the others."""
    if world_size() == 1:
        return
    parameters = list(parameters)
    absent = [{i for i, p in enumerate(parameters) if p.grad is None}]
    missing = set.intersection(*gather(absent[0]))
    gradients = []
    for i, parameter in enumerate(parameters):
        if i not in missing:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
    reduce_in_buckets(gradients, dist.ReduceOp.SUM, 1 / world_size())


def share_buffers(module: nn.Module) -> None:
    """One value for what each process has counted for itself: the mean of the statistics of a normalisation,
    and of whole numbers the smallest, which is right for how long a code was not used."""
    if world_size() == 1:
        return
    own = dict(module.named_parameters())
    buffers = [value for name, value in module.state_dict().items() if name not in own]
    reduce_in_buckets([b for b in buffers if b.is_floating_point()], dist.ReduceOp.SUM, 1 / world_size())
    reduce_in_buckets([b for b in buffers if not b.is_floating_point()], dist.ReduceOp.MIN)


def share_weights(module: nn.Module) -> None:
    """Parameters and buffers of rank 0 for all."""
    if world_size() == 1:
        return
    with connected(), torch.no_grad():
        for tensor in module.state_dict().values():
            whole = tensor.contiguous()
            dist.broadcast(whole, 0)
            tensor.copy_(whole)


@torch.no_grad()
def reduce_in_buckets(
    tensors: Sequence[Tensor], operation: dist.ReduceOp.RedOpType, scale: float = 1.0
) -> None:
    """Reduce tensors of one number format over the processes, many at once: each call has its price."""
    for bucket in buckets(tensors):
        flat = torch.cat([tensor.flatten() for tensor in bucket])
        with connected():
            dist.all_reduce(flat, operation)
        if scale != 1:
            flat *= scale
        for tensor, piece in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(piece.view(tensor.shape))


def buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of the same number format, up to `BUCKET` values together."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        full = bucket and sum(t.numel() for t in bucket) + tensor.numel() > BUCKET
        if full or (bucket and bucket[0].dtype != tensor.dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
