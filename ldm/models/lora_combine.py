"""New LoRAs of given ones, without training: sums, fewer ranks, and the difference of two networks.

    concatenated   exactly  sum_i s_i dW_i, its rank the sum of the ranks
    reduced        the nearest dW of a lower rank (Eckart and Young 1936), by the singular values
    averaged       kohya's merge_lora.py: factors are averaged, not changes. Its product has squares of the
                   ratios and products of one LoRA's `up` with another's `down`; it is no sum of the LoRAs
    extracted      the LoRA nearest to what a fine-tuned network adds to its base

dW = U S V^T is decomposed in float64, without forming it where its factors are known: by QR of both. Used by
`ldm-weights lora`.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ldm.models.lora_math import Factors, LoRAWeights

Weighted = Sequence[tuple[LoRAWeights, float]]  # LoRAs and their scales


def concatenated(loras: Weighted) -> dict[str, Factors]:
    """sum_i s_i dW_i exactly, up to rounding: factors side by side. Ranks add up; alpha is the rank.

    Raises ValueError for a layer whose shapes differ.
    """
    combined = {}
    for layer in _layers(loras):
        parts = [(weights[layer], scale) for weights, scale in loras if layer in weights]
        _require_same(layer, [factors for factors, _ in parts])
        down = torch.cat([factors.down.float() for factors, _ in parts])
        up = torch.cat([factors.up.float() * (scale * factors.scale) for factors, scale in parts], dim=1)
        combined[layer] = Factors(down, up, len(down))
    return combined


def averaged(loras: Weighted) -> dict[str, Factors]:
    """kohya's merge: up = sum |s_i| up_i, down = sum s_i down_i with s_i = sqrt(alpha_i / alpha) ratio_i.

    Not a sum of LoRAs: see above. alpha is that of the first one that has the layer. Raises ValueError for
    ranks or shapes that differ.
    """
    combined = {}
    for layer in _layers(loras):
        parts = [(weights[layer], ratio) for weights, ratio in loras if layer in weights]
        _require_same(layer, [factors for factors, _ in parts])
        if len({factors.rank for factors, _ in parts}) > 1:
            ranks = ", ".join(str(factors.rank) for factors, _ in parts)
            raise ValueError(f"layer {layer}: different ranks ({ranks}) cannot be averaged; sum them")
        alpha = parts[0][0].alpha
        if min(factors.alpha for factors, _ in parts) <= 0:
            raise ValueError(f"layer {layer}: an alpha of 0 or below has no root")
        scales = [math.sqrt(factors.alpha / alpha) * ratio for factors, ratio in parts]
        down = sum((s * f.down.float() for (f, _), s in zip(parts, scales, strict=True)), torch.zeros(()))
        up = sum((abs(s) * f.up.float() for (f, _), s in zip(parts, scales, strict=True)), torch.zeros(()))
        combined[layer] = Factors(down, up, alpha)
    return combined


def reduced(weights: LoRAWeights, rank: int | None = None, energy: float | None = None) -> dict[str, Factors]:
    """Each layer's change at a lower rank: at most `rank`, or what keeps that share of the energy, or both.

    Energy is the sum of squared singular values. Layers that change nothing are left out. Raises ValueError
    as `kept`.
    """
    return {
        layer: factors
        for layer, each in weights.items()
        if (factors := _truncated(*_svd(each), each.shape, rank, energy)) is not None
    }


def extracted(
    base: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    rank: int | None = None,
    energy: float | None = None,
) -> dict[str, Factors]:
    """The LoRA of the difference of two networks' weights by layer: all that both have and that differ.

    Raises ValueError for shapes that differ, where nothing does, and as `kept`.
    """
    found = {}
    for layer, weight in base.items():
        if tuned[layer].shape != weight.shape:
            raise ValueError(
                f"{layer} is {tuple(weight.shape)} in the base, {tuple(tuned[layer].shape)} in the other"
            )
        change = (tuned[layer].float() - weight.float()).flatten(1)
        if not change.any():
            continue
        factors = _truncated(*_decomposed(change), weight.shape, rank, energy)
        assert factors is not None, "it is not zero"
        found[layer] = factors
    if not found:
        raise ValueError("the two models do not differ in any layer")
    return found


def kept(values: Float[Tensor, " n"], rank: int | None, energy: float | None) -> int:
    """How many singular values are kept. Raises ValueError for a rank below 1 and an energy outside 0..1."""
    if rank is None and energy is None:
        raise ValueError("say how much is kept: a rank, or a share of the energy")
    if rank is not None and rank < 1:
        raise ValueError(f"the rank must be at least 1, got {rank}")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"the energy kept must be above 0 and at most 1, got {energy:g}")
    numeric = values > values[0] * len(values) * torch.finfo(torch.float32).eps  # beyond rounding
    count = int(numeric.sum())
    if energy is not None:
        shares = values.square().cumsum(0) / values.square().sum()
        count = min(count, int((shares < energy - 1e-12).sum()) + 1)
    return max(1, count if rank is None else min(count, rank))


def _svd(factors: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, r), S (r,), V^T (r, in) of a change, from its factors."""
    up, down = factors.up.double().flatten(1) * factors.scale, factors.down.double().flatten(1)
    (q_up, r_up), (q_down, r_down) = torch.linalg.qr(up), torch.linalg.qr(down.T)
    u, s, vh = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    return q_up @ u, s, vh @ q_down.T


def _decomposed(matrix: Float[Tensor, "m n"]) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, V^T of a whole matrix, by the eigenvectors of its smaller product with itself in float64.

    Small singular values, below 1e-7 of the largest, are lost; it takes a tenth of the time of an SVD.
    """
    wide = matrix.double() if matrix.shape[0] <= matrix.shape[1] else matrix.double().T
    squares, u = torch.linalg.eigh(wide @ wide.T)
    s, u = squares.flip(0).clamp(min=0).sqrt(), u.flip(1)
    vh = (u.T @ wide) / s.clamp(min=s[0] * 1e-9)[:, None]
    return (u, s, vh) if matrix.shape[0] <= matrix.shape[1] else (vh.T, s, u.T)


def _truncated(
    u: Tensor, s: Tensor, vh: Tensor, shape: torch.Size, rank: int | None, energy: float | None
) -> Factors | None:
    """The first singular vectors as factors, the roots of the values on both sides; None for no change."""
    count = kept(s, rank, energy)
    if not s[0] > 0:
        return None
    root = s[:count].sqrt()
    down, up = root[:, None] * vh[:count], u[:, :count] * root
    one = [1] * (len(shape) - 2)
    return Factors(
        down.float().reshape(count, *shape[1:]).contiguous(),
        up.float().reshape(shape[0], count, *one).contiguous(),
        count,
    )


def _layers(loras: Weighted) -> list[str]:
    """Of any of them, each once, in their order."""
    return list(dict.fromkeys(layer for weights, _ in loras for layer in weights))


def _require_same(layer: str, factors: Sequence[Factors]) -> None:
    if len({each.shape for each in factors}) > 1:
        shapes = ", ".join("x".join(map(str, each.shape)) for each in factors)
        raise ValueError(f"layer {layer} has different shapes: {shapes}; LoRAs of one base can be combined")
