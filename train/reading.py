"""Reading the pictures of a set, in this process or by worker processes, always in the same order.

The number of workers changes the time this takes and nothing else: what is read comes in the order in which
it was asked for, and where a worker is killed, this process reads the rest itself. Workers decode pictures
with Pillow and NumPy alone, so that they may be forked from a process in which torch has threads.
"""

import contextlib
import os
import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from sample.images import read_rgb
from train.buckets import Shape, read_cut
from train.entries import Entry

AT_ONCE = 16  # pictures that a worker reads before it hands them over

Picture = np.ndarray | str  # (size, size, 3) uint8, or why it could not be read


def read_picture(entry: Entry, size: int | Shape) -> np.ndarray:
    """One picture as (size, size, 3) uint8 RGB, or in the shape (W, H) of its bucket.

    Raises ValueError with its name and what is wrong with it.
    """
    try:
        content = entry.stored.read() if entry.stored else None
        if not isinstance(size, int):
            return np.array(read_cut(entry.path, size, content))
        return np.array(read_rgb(entry.path, size, content))
    except ValueError as error:
        raise ValueError(f"{error} ({entry.source})" if entry.source else str(error)) from None


def to_pixels(pictures: Sequence[np.ndarray]) -> UInt8[Tensor, "B 3 H W"]:
    """Pictures as one tensor."""
    height, width, _ = pictures[0].shape
    pixels = torch.empty(len(pictures), 3, height, width, dtype=torch.uint8)
    for row, picture in zip(pixels, pictures, strict=True):
        row.copy_(torch.from_numpy(picture).permute(2, 0, 1))
    return pixels


class Reader:
    """Reads `entries`, cut and resized to `size`, or each to its own; `workers` 0 reads in this process."""

    def __init__(self, entries: Sequence[Entry], size: int | Sequence[Shape], workers: int = 0):
        self.entries, self.size, self.workers = entries, size, workers
        self.pool: ProcessPoolExecutor | None = None

    def read(self, index: int) -> np.ndarray:
        """Picture `index`. Raises ValueError as `read_picture`."""
        size = self.size if isinstance(self.size, int) else self.size[index]
        return read_picture(self.entries[index], size)

    def try_all(self, indices: Sequence[int]) -> list[Picture]:
        """The pictures `indices`, in this process; of those that cannot be read the reason."""
        pictures: list[Picture] = []
        for index in indices:
            try:
                pictures.append(self.read(index))
            except ValueError as error:
                pictures.append(str(error))
        return pictures

    def start(self, indices: Sequence[int]) -> Callable[[], list[Picture]]:
        """Have the pictures read; what is returned waits for them."""
        indices = list(indices)
        if self.workers and self.pool is None:
            self.pool = ProcessPoolExecutor(
                self.workers, initializer=_begin, initargs=(self.entries, self.size, os.getpid())
            )
        future: Future[list[Picture]] | None = None
        if self.pool is not None:
            with contextlib.suppress(BrokenProcessPool):
                future = self.pool.submit(_read, indices)

        def wait() -> list[Picture]:
            if future is None:
                return self.try_all(indices)
            try:
                return future.result()
            except BrokenProcessPool:
                self._go_on_alone()
                return self.try_all(indices)

        return wait

    def in_order(self, indices: Iterable[int]) -> Iterator[tuple[int, Picture]]:
        """Each index with its picture; a few more than are asked for are read ahead."""
        waiting: deque[tuple[list[int], Callable[[], list[Picture]]]] = deque()
        rest = iter(indices)
        while True:
            while len(waiting) <= 2 * self.workers and (part := list(islice(rest, AT_ONCE))):
                waiting.append((part, self.start(part)))
            if not waiting:
                return
            part, wait = waiting.popleft()
            yield from zip(part, wait(), strict=True)

    def _go_on_alone(self) -> None:
        if self.workers:
            warnings.warn(
                "a process that reads pictures was killed; from now on they are read without data.workers",
                stacklevel=2,
            )
        self.workers = 0
        self.close()

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)
            self.pool = None

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Ahead:
    """Parts of batches, of which the same part of the next step is read while this one is worked on.

    pixels: a view of a file, say, in which to look up rows may be to wait for a disk. rows: which a part of a
    batch has, a function of (step, part): nothing else decides what comes. threads: 0 reads when asked to.
    """

    def __init__(self, pixels: Any, rows: Callable[[int, int], Tensor], threads: int = 1):
        self.pixels, self.rows = pixels, rows
        self.pool = ThreadPoolExecutor(threads, "ahead") if threads else None
        self.started: dict[tuple[int, int], Future[Tensor]] = {}

    def __call__(self, step: int, part: int) -> Tensor:
        """The rows of `pixels` of this part, (b, ...)."""
        if self.pool is None:
            return self.pixels[self.rows(step, part)]
        self.started = {key: future for key, future in self.started.items() if key[0] in (step, step + 1)}
        for key in ((step, part), (step + 1, part)):
            if key not in self.started:
                self.started[key] = self.pool.submit(self.pixels.__getitem__, self.rows(*key))
        return self.started[step, part].result()


def images_per_second(fetch: Callable[[int], Any], batch: int, steps: int = 50, skipped: int = 5) -> float:
    """The rate of a loader alone: `fetch(step)` brings the `batch` images of a step, counted from 0.

    The first `skipped` steps are not counted, in which worker processes start.
    """
    for step in range(skipped):
        fetch(step)
    begin = time.perf_counter()
    for step in range(skipped, skipped + steps):
        fetch(step)
    return steps * batch / (time.perf_counter() - begin)


# --- in a worker process ------------------------------------------------------------------------------------

_reader: Reader | None = None


def _begin(entries: Sequence[Entry], size: int | Sequence[Shape], parent: int) -> None:
    global _reader
    _reader = Reader(entries, size)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # CTRL-C is for the parent, who saves first
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """Nobody else ends a worker whose parent was killed."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _read(indices: list[int]) -> list[Picture]:
    assert _reader is not None
    return _reader.try_all(indices)
