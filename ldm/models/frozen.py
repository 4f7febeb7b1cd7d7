"""Frozen layers that keep no activation for a gradient nobody asks for.

    lean(unet)      # after add_lora: the same outputs and gradients in less memory

torch's convolution keeps its input for the gradient of its weight, also where the weight is frozen; the
gradient of the input needs the weight alone. Likewise norm(x) before silu and gelu(gate) of the feed-forward
are kept, which are cheap to compute again. Training a LoRA (`lora.py`) or an embedding through a frozen
network holds less for it.
"""

from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ldm.models.attention import FeedForward
from ldm.models.blocks import ResBlock, add, convolve, repeat_rows

M = TypeVar("M", bound=nn.Module)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, places: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.dtype, ctx.places = x.shape, x.dtype, places
        return F.conv2d(x, weight, bias, *places)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight = ctx.saved_tensors[0].to(grads[0].dtype)  # in mixed precision the product was in that, too
        nothing = grads[0].new_empty(1).expand(ctx.shape)  # of the input only the shape counts
        grad = torch.ops.aten.convolution_backward(
            grads[0], nothing, weight, None, *(list(place) for place in ctx.places[:3]),
            False, [0, 0], ctx.places[3], [True, False, False],
        )[0]  # fmt: skip
        return grad.to(ctx.dtype), None, None, None


class FrozenConv2d(nn.Conv2d):
    """A convolution whose weight and bias get no gradient."""

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C2 H2 W2"]:
        if not torch.is_grad_enabled() or not x.requires_grad:
            return super().forward(x)
        places = (self.stride, self.padding, self.dilation, self.groups)
        y: Tensor = _Convolution.apply(x, self.weight, self.bias, places)
        return y


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        value, gate = h.chunk(2, dim=-1)
        return F.gelu(gate) * value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (h,) = ctx.saved_tensors
        value, gate = h.chunk(2, dim=-1)
        by_gate = torch.ops.aten.gelu_backward(grads[0] * value, gate)
        return torch.cat([grads[0] * F.gelu(gate), by_gate], dim=-1)


class LeanFeedForward(FeedForward):
    def _gated(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super()._gated(x)
        gated: Tensor = _Gate.apply(self.proj_in(x))
        return self.proj_out(gated)


class _NormSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        batch, channels, pixels = len(x), x.shape[1], x[0, 0].numel()
        ctx.sizes = (batch, channels, pixels, groups)
        y, mean, deviation = torch.native_group_norm(
            x.contiguous(), weight, bias, batch, channels, pixels, groups, eps
        )
        ctx.save_for_backward(x, weight, bias, mean, deviation)
        ctx.eps = eps
        return F.silu(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, deviation = ctx.saved_tensors
        batch, channels, pixels, groups = ctx.sizes
        y = torch.native_group_norm(x.contiguous(), weight, bias, batch, channels, pixels, groups, ctx.eps)[0]
        grad = torch.ops.aten.silu_backward(grads[0], y).contiguous()
        asked = [True, False, False]
        grad = torch.ops.aten.native_group_norm_backward(
            grad, x.contiguous(), mean, deviation, weight, *ctx.sizes, asked
        )[0]
        return grad, None, None, None, None


def norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """`silu(norm(x))` with a frozen norm; x is kept, and what lies between computed again."""
    y: Tensor = _NormSilu.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps)
    return y


class LeanResBlock(ResBlock):
    """The residual block of Stable Diffusion with frozen norms; other forms of it are left as they are."""

    def forward(
        self, x: Float[Tensor, "B C H W"], emb: Float[Tensor, "B_emb time_dim"] | None = None
    ) -> Float[Tensor, "B C2 H2 W2"]:
        mixed = x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)  # norms in float32
        other = self.scale_shift or self.resample or self.time_proj is None or emb is None
        if mixed or other or not torch.is_grad_enabled() or (self.training and self.dropout.p):
            return super().forward(x, emb)
        assert self.time_proj is not None, "see above"
        assert emb is not None, "see above"
        h = convolve(self.conv1, norm_silu(self.norm1, x))
        h = add(h, repeat_rows(self.time_proj(F.silu(emb)), len(h))[:, :, None, None])
        return add(convolve(self.conv2, norm_silu(self.norm2, h)), self.shortcut(x))


def lean(module: M) -> M:
    """`module` itself, its frozen convolutions and norms and all its feed-forwards in this form, in place.

    A layer whose own weight is trained later gets no gradient: call this once it is said what is trained.
    """
    for layer in module.modules():
        if type(layer) is ResBlock and _frozen(layer.norm1) and _frozen(layer.norm2):
            layer.__class__ = LeanResBlock
        elif type(layer) is nn.Conv2d and _frozen(layer):
            if isinstance(layer.padding, tuple) and layer.padding_mode == "zeros":
                layer.__class__ = FrozenConv2d
        elif type(layer) is FeedForward:
            layer.__class__ = LeanFeedForward
    return module


def _frozen(layer: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in layer.parameters())
