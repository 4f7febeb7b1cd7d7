"""Training by several processes at once, on torch's own engine; the loop is the same for one and for many.

`torchrun --nproc-per-node N -m train TASK CONFIG` starts N equal processes, ranks 0 to N-1, with a copy of
the model each. The parts of a step's batch are what they share out: a batch has `run.accumulate` x N parts,
rank r takes parts r, r + N, ... one after the other, and the gradients are averaged over all. Noise,
timesteps and dropout are functions of (seed, step, part) and data of (seed, step): 1 process with accumulate
4, 2 with 2 and 4 with 1 are the same run, up to the order of float32 sums, and go on from each other's
states.

What one process decides, all must know, or they wait for each other for ever: `gather`, `agreed` and
`together` say what happened to all, before the next step. Only rank 0 writes; a process that is gone is
`Lost` to the others, and the run goes on with --resume. In a single process all of this does nothing.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")

LAUNCHED = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}  # what torchrun sets
BUCKET = 2**24  # values averaged at once: 64 MiB in float32
PATIENCE = timedelta(
    hours=6
)  # for rank 0 to encode a data set, say; a process that is gone is noticed at once
FAREWELL = 3.0  # seconds for all to say their last words, before the launcher ends those that are left


class Elsewhere(Exception):
    """Another process has failed, and says why; this one ends too."""


class Lost(ConnectionError):
    """Another process of the job is gone."""


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process is the one that logs, validates and writes."""
    return rank() == 0


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


# --- beginning and end --------------------------------------------------------------------------------------


@contextmanager
def launched() -> Iterator[None]:
    """Inside the block this process is one of those that a launcher such as torchrun started, if one did.

    On GPUs each process of a machine has its own, by NCCL; where there are fewer, they share those, by gloo.
    """
    if not os.environ.keys() >= LAUNCHED:
        yield
        return
    gpus, local = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
    if gpus:
        torch.cuda.set_device(local % gpus)
    enough = 0 < int(os.environ.get("LOCAL_WORLD_SIZE", local + 1)) <= gpus
    store, number, world = next(iter(dist.rendezvous("env://", timeout=PATIENCE)))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if enough else "gloo",
        store=dist.PrefixStore("training", store),
        rank=number,
        world_size=world,
        timeout=PATIENCE,
    )
    try:
        yield
    finally:
        leave(dist.PrefixStore("left", store))


def leave(store: dist.Store) -> None:
    """End together: the launcher ends the rest as soon as one process has failed, in the middle of a line.

    Rank 0 is the last, since it may be the one that keeps the store.
    """
    try:
        if not meet(store, "here"):
            return
        if is_first():
            meet(store, "gone")
        else:
            store.set(f"gone{rank()}", "")
    except RuntimeError:  # the machine with the store may be gone
        return
    dist.destroy_process_group()


def meet(store: dist.Store, stage: str) -> bool:
    """Whether all processes say within a few seconds that they have come to this stage."""
    store.set(f"{stage}{rank()}", "")
    everybody = [f"{stage}{other}" for other in range(world_size())]
    end = time.monotonic() + FAREWELL
    while time.monotonic() < end:
        if store.check(everybody):
            return True
        time.sleep(0.01)
    return False


@contextmanager
def connected() -> Iterator[None]:
    """Raises Lost where torch tells, in its own ways, that a process does not answer."""
    try:
        yield
    except RuntimeError as error:
        raise Lost(
            f"rank {rank()} of {world_size()}: another process of this job has ended, or does not answer; "
            "its own message stands above, unless it was killed. What is saved is whole: start all processes "
            "again, with --resume"
        ) from error


# --- agreement ----------------------------------------------------------------------------------------------


def gather(value: T) -> list[T]:
    """`value` of every process, in the order of their ranks; small things."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    with connected():
        dist.all_gather_object(values, value)
    return values


def highest(value: int) -> int:
    """The largest `value` of any process."""
    if world_size() == 1:
        return value
    tensor = torch.tensor(value)
    with connected():
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


@contextmanager
def together() -> Iterator[None]:
    """An error in this block ends all processes: raised in the first that has it, Elsewhere in the others.

    They wait for each other at its end; inside it they must not.
    """
    if world_size() == 1:
        yield
        return
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    failures = gather(failure is not None)
    if any(failures):
        first = failures.index(True)
        if failure is not None and rank() == first:
            raise failure
        raise Elsewhere(f"rank {first} failed") from failure


@contextmanager
def agreed(kind: type[Exception]) -> Iterator[None]:
    """An error of this kind in the block of any process is raised in all: that of the lowest rank."""
    if world_size() == 1:
        yield
        return
    failure: Exception | None = None
    try:
        yield
    except kind as error:
        failure = error
    for theirs in gather(failure):
        if theirs is not None:
            raise theirs from failure


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


def first_then_others(action: Callable[[], object]) -> None:
    """Rank 0 does it alone, then all others: they find on the disk what it took rank 0 time to make."""
    for first in (True, False):
        with together():
            if is_first() == first:
                action()


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
