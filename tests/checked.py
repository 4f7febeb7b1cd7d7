"""Types and shapes of each call are checked, but of calls that a check cannot tell apart only the first.

The hook of `conftest.py` puts `jaxtyping.jaxtyped` around every function of the packages. A check takes about as
long as a small layer needs to compute, and nothing is learned from it at each of the equal steps of a sampler. Whether a call passes depends on the types of what goes in and out, and
of tensors on formats and shapes, also of those in lists and dictionaries: `kind`. What passed once passes again.
"""

import functools
import threading
from collections.abc import Callable, Collection, Hashable
from dataclasses import is_dataclass
from types import FunctionType, SimpleNamespace
from typing import Any

import jaxtyping
import numpy as np
import torch

MOST = 64  # items of a list or dictionary that are looked at
BY_VALUE = ("{", "Literal", "Annotated")  # in annotations that ask for more than `kind` tells
EXACT = jaxtyping.jaxtyped  # checks every call

_shared: dict[tuple[str, str, int], set[Hashable]] = {}  # of functions within functions, made again and again


class Unknown(Exception):
    """A value of which a check may depend on more than is looked at."""


def _of_type(value: object) -> Hashable:
    return type(value)


def _of_array(value: Any) -> Hashable:
    return type(value), value.dtype, value.shape


def _of_items(value: Any) -> Hashable:
    if len(value) > MOST:
        raise Unknown
    return type(value), *map(kind, value)


def _of_mapping(value: Any) -> Hashable:
    if len(value) > MOST:
        raise Unknown
    return type(value), *map(kind, value), None, *map(kind, value.values())


def _of_class(value: object) -> Hashable:
    return value  # checked against type[...]


def _unknown(value: object) -> Hashable:
    raise Unknown


@functools.cache
def _way(cls: type) -> Callable[[Any], Hashable]:
    """How to find the `kind` of the objects of a class; the first that fits counts."""
    for family, way in (
        ((torch.Tensor, np.ndarray), _of_array),
        ((torch.nn.Module, str, bytes), _of_type),
        ((list, tuple), _of_items),
        (dict, _of_mapping),
        (type, _of_class),
        ((Collection, SimpleNamespace), _unknown),
    ):
        if issubclass(cls, family):  # type: ignore[arg-type]
            return way
    return _of_type


def kind(value: object) -> Hashable:
    """Equal for values that pass the same checks. Raises Unknown for those it does not know."""
    return _way(type(value))(value)


def known(value: object) -> Hashable | None:
    """The kind of a value, or none."""
    try:
        return kind(value)
    except (Unknown, RecursionError):  # the latter of a list that holds itself
        return None


def once(function: Callable[..., Any], typechecker: object) -> Callable[..., Any]:
    """A function with its calls checked, each kind of call once."""
    given = threading.local()  # a result to be checked in place of computing one
    exact: Callable[..., Any] | None = None
    by_value = any(word in str(hint) for hint in function.__annotations__.values() for word in BY_VALUE)
    has_result = "return" in function.__annotations__
    passed: set[Hashable] = set()
    if "<locals>" in function.__qualname__:
        place = (function.__module__, function.__qualname__, function.__code__.co_firstlineno)
        passed = _shared.setdefault(place, passed)

    def compute(*args: Any, **options: Any) -> Any:
        return given.__dict__.pop("result") if given.__dict__ else function(*args, **options)

    def in_full(*args: Any, **options: Any) -> Any:
        nonlocal exact
        if exact is None:  # at the first call: this takes milliseconds
            body = FunctionType(compute.__code__, function.__globals__, "compute", None, compute.__closure__)
            exact = EXACT(functools.wraps(function)(body), typechecker=typechecker)
        return exact(*args, **options)

    if by_value:
        return functools.wraps(function)(in_full)

    @functools.wraps(function)
    def checked(*args: Any, **options: Any) -> Any:
        try:
            call = (*map(kind, args), *((name, kind(value)) for name, value in options.items()))
        except (Unknown, RecursionError):
            return in_full(*args, **options)
        new = call not in passed
        result = in_full(*args, **options) if new else function(*args, **options)
        passed.add(call)
        if has_result:
            ended = (call, known(result))
            if not new and (ended[1] is None or ended not in passed):
                check_result(result, args, options)
            passed.add(ended)
        return result

    def check_result(result: object, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        given.result = result
        try:
            in_full(*args, **options)
        finally:
            given.__dict__.clear()

    return checked


def jaxtyped(what: Any = None, *, typechecker: object = None) -> Any:
    """As `jaxtyping.jaxtyped`, for what the hook hands to it: functions and classes."""
    if what is None:
        return functools.partial(jaxtyped, typechecker=typechecker)
    if isinstance(what, FunctionType):
        return once(what, typechecker)
    if isinstance(what, type) and is_dataclass(what):
        if "__init__" in vars(what) and not hasattr(what.__init__, "__wrapped__"):
            what.__init__ = once(what.__init__, typechecker)  # type: ignore[method-assign]
        return what
    return what if isinstance(what, type) else EXACT(what, typechecker=typechecker)


def install() -> None:
    """Shapes and types of every function of the packages, which nobody may have imported yet."""
    jaxtyping.jaxtyped = jaxtyped
    jaxtyping.install_import_hook(["ldm", "sample", "train"], "beartype.beartype")
