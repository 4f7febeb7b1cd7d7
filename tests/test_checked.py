"""Checks of types and shapes: on by the hook, and none is left out that could fail."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import checked
import pytest
import torch
from beartype import beartype
from jaxtyping import Float, TypeCheckError
from torch import Tensor, nn

A, B = torch.zeros(2, 3), torch.zeros(3, 4)


def times(a: Float[Tensor, "n k"], b: Float[Tensor, "k m"], scale: float | int = 1) -> Float[Tensor, "n m"]:
    return scale * a @ b


def number(values: list[int] | dict[str, tuple[int, Tensor]], *, kind: type[nn.Module] = nn.Linear) -> int:
    return len(values)


def shape(weight: nn.Parameter) -> tuple[int, ...]:
    return tuple(weight.shape)


def square(size: int) -> Float[Tensor, "{size} {size}"]:
    return torch.zeros(2, 2)


@pytest.mark.parametrize(
    ("function", "good", "bad"),
    [
        (times, {"a": A, "b": B}, {"b": torch.zeros(2, 4)}),
        (times, {"a": A, "b": B}, {"b": B.int()}),
        (times, {"a": A, "b": B}, {"b": B[None]}),
        (times, {"a": A, "b": B}, {"a": A.numpy()}),
        (times, {"a": A, "b": B, "scale": 2}, {"scale": "2"}),
        (times, {"a": A, "b": B, "scale": 2}, {"scale": None}),
        (number, {"values": [1, 2]}, {"values": [1.0, 2.0]}),
        (number, {"values": {"a": (1, A)}}, {"values": {1: (1, A)}}),
        (number, {"values": {"a": (1, A)}}, {"values": {"a": (A, 1)}}),
        (number, {"values": [1], "kind": nn.Conv2d}, {"kind": int}),
        (shape, {"weight": nn.Parameter(A)}, {"weight": A}),
        (number, {"values": list(range(100))}, {"values": list("x" * 100)}),
        (square, {"size": 2}, {"size": 3}),
    ],
)
def test_a_call_that_differs_in_what_counts_is_checked(
    function: Callable[..., Any], good: dict[str, Any], bad: dict[str, Any]
) -> None:
    function = checked.once(function, beartype)
    for _ in range(2):
        function(**good)
        with pytest.raises(TypeCheckError, match="Type-check error whilst checking the"):
            function(**good | bad)


@pytest.mark.parametrize("wrong", [torch.zeros(2, 3), torch.zeros(2, 4).half(), None, torch.zeros(8)])
def test_each_result_is_checked(wrong: object) -> None:
    results = [torch.zeros(2, 4), torch.zeros(2, 4), wrong, wrong, torch.zeros(2, 4, dtype=torch.float64)]

    def times(a: Float[Tensor, "n k"], b: Float[Tensor, "k m"]) -> Float[Tensor, "n m"]:
        return results.pop(0)

    half = torch.zeros(2, 4).half()
    function = checked.once(times, beartype)
    for _ in range(2):
        function(A, B)
    for _ in range(2):
        if isinstance(wrong, Tensor) and wrong.shape == half.shape:
            function(A, B)  # any floating point is asked for
        else:
            with pytest.raises(TypeCheckError, match="checking the return value"):
                function(A, B)
    assert function(A, B).dtype == torch.float64
    assert results == []


def test_what_passed_is_computed_again_and_not_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = []

    def exact(function: Callable[..., Any], typechecker: object) -> Callable[..., Any]:
        def full(*args: object, **options: object) -> object:
            checks.append(args)
            return function(*args, **options)

        return full

    monkeypatch.setattr(checked, "EXACT", exact)
    calls = []

    def count(x: Tensor) -> Tensor:
        calls.append(x)
        return x + 1

    function = checked.once(count, beartype)
    outs = [function(x) for x in (A, A + 1, B, A, B)]
    assert len(calls) == 5
    assert [out.shape for out in outs] == [x.shape for x in calls] and outs[1].mean() == 2
    assert len(checks) == 2  # of each shape one
    assert function.__name__ == "count" and function.__annotations__ == count.__annotations__


def test_what_holds_itself() -> None:
    """Checked in full at each call, as it goes in and out."""

    def same(values: list[object]) -> list[object]:
        return values

    ring: list[object] = []
    ring.append(ring)
    made = checked.jaxtyped(same, typechecker=beartype)
    assert made(ring) is ring
    assert made(ring) is ring
    with pytest.raises(TypeCheckError):
        made(tuple(ring))


def test_functions_within_functions_share_what_passed() -> None:
    def make(shift: int) -> Callable[..., Any]:
        def add(x: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
            return x + shift

        return checked.once(add, beartype)

    assert [make(shift)(torch.zeros(1)).item() for shift in (1, 2, 3)] == [1, 2, 3]
    with pytest.raises(TypeCheckError):
        make(4)(torch.zeros(1, 1))


def test_dataclasses() -> None:
    @dataclass(frozen=True)
    class Pair:
        a: int
        b: Float[Tensor, " n"]

    pair = checked.jaxtyped(typechecker=beartype)(Pair)
    assert checked.jaxtyped(typechecker=beartype)(pair) is pair
    for _ in range(2):
        assert pair(1, torch.zeros(2)).a == 1
        with pytest.raises(TypeCheckError, match="b"):
            pair(1, torch.zeros(2, 2))


def test_the_hook_is_on() -> None:
    from ldm.config import find_config
    from ldm.models.blocks import add
    from ldm.models.unet import UNetConfig

    for _ in range(2):
        assert add(torch.zeros(2, 3), torch.zeros(2, 3)).shape == (2, 3)
        with pytest.raises(TypeCheckError, match=r"ldm\.models\.blocks\.add"):
            add(torch.zeros(2, 3), torch.zeros(2, 4))
        with pytest.raises(TypeCheckError):
            find_config(3)
        with pytest.raises(TypeCheckError):
            UNetConfig(model_channels="16")
