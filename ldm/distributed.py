"""Several processes on one job, on torch's own engine: how they find each other, agree and end together.

`torchrun --nproc-per-node N -m train ...` (or `-m sample evaluate ...`) starts N equal processes, ranks 0 to
N-1. What one of them decides, all must know, or they wait for each other for ever: `gather`, `agreed` and
`together` say what happened to all, before the next step. Only rank 0 writes; a process that is gone is
`Lost` to the others. In a single process all of this does nothing. What training adds stands in
`train/distributed.py`; sampling deals out its pictures by `share` and `collect`.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

LAUNCHED = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}  # what torchrun sets
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
    """Whether this process is the one that logs and writes."""
    return rank() == 0


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
        store=dist.PrefixStore("work", store),
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
            "its own message stands above, unless it was killed"
        ) from error


@contextmanager
def last_words(advice: str) -> Iterator[None]:
    """Where a process is Lost in the block, the launcher does not end this one in the middle of saying so,
    with `advice` at the end."""
    try:
        yield
    except Lost as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Lost(f"{error}. {advice}") from error


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

    They wait for each other at its end. Inside of it they must not, unless in such a block again, which all
    of them reach.
    """
    if world_size() == 1:
        yield
        return
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    if isinstance(failure, Lost):
        raise failure
    failures = gather(failure is not None and not isinstance(failure, Elsewhere))
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


def first_then_others(action: Callable[[], object]) -> None:
    """Rank 0 does it alone, then all others: they find on the disk what it took rank 0 time to make."""
    for first in (True, False):
        with together():
            if is_first() == first:
                action()


# --- shares -------------------------------------------------------------------------------------------------


def share(count: int, batch: int = 1) -> range:
    """This process's share of the numbers 0..count-1: neighbours, in whole batches.

    So the batches of all processes are those that a single one would form.
    """
    batches, ranks = -(-count // batch), world_size()
    start, stop = (batches * at // ranks * batch for at in (rank(), rank() + 1))
    return range(min(start, count), min(stop, count))


def collect(values: list[T]) -> list[T]:
    """The values of all processes in the order of their ranks, in rank 0; an empty list in the others."""
    if world_size() == 1:
        return values
    lists: list[Any] | None = [None] * world_size() if is_first() else None
    with connected():
        dist.gather_object(values, lists)
    return [value for theirs in lists or () for value in theirs]


def rows_of_all(tensor: Tensor) -> Tensor:
    """`collect` for the rows of a tensor."""
    if world_size() == 1:
        return tensor
    parts = collect([tensor.cpu()])
    return torch.cat(parts) if parts else tensor[:0]
