"""Steps whose loss or gradient is not finite, or too large: what is said of them, and how they are undone."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from train.loop import RunConfig

NAMED = 3  # pictures of a bad batch that are named


class BadStep(Exception):
    """The loss or the gradient of a step is not finite, or too large; nothing has moved."""


def require_sound(
    what: str, value: float, limit: float, step: int, batch: Callable[[], str] | None = None
) -> None:
    """Raises BadStep for a value that is not finite or above `limit`; `batch` says what the step has seen."""
    if math.isfinite(value) and value <= limit:
        return
    seen = f" ({batch()})" if batch is not None else ""
    if not math.isfinite(value):
        raise BadStep(f"{what} is {value} in step {step + 1}{seen}")
    raise BadStep(f"{what} is {value:.4g} in step {step + 1}, above run.max_gradient {limit:g}{seen}")


def require_skippable(bad: BadStep, in_a_row: int, run: "RunConfig") -> None:
    if run.on_nonfinite == "skip" and in_a_row <= run.max_skips:
        return
    stop = run.on_nonfinite == "stop"
    way_out = "run.on_nonfinite=skip" if stop else f"a higher run.max_skips (bad step {in_a_row} in a row)"
    raise ValueError(
        f"{bad}; the state saved last is untouched, but goes the same way again: start a new run with a "
        f"lower run.lr or run.clip, or go on with --resume and {way_out}"
    ) from bad


@contextmanager
def undone_if_bad(tensors: Iterable[Tensor]) -> Iterator[None]:
    """A bad step leaves these as they were: what a pass itself writes to, before any optimiser moves."""
    before = [(tensor, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    except BadStep:
        for tensor, value in before:
            tensor.detach().copy_(value)
        raise


def pictures(files: Sequence[str], notes: Sequence[str] = ()) -> str:
    """The first few pictures of a batch in one line, each with its note, if there are notes."""
    told = [f"{file} at {note}" for file, note in zip(files, notes, strict=True)] if notes else [*files]
    more = f" and {len(told) - NAMED} more" if len(told) > NAMED else ""
    return f"pictures {', '.join(told[:NAMED])}{more}"
