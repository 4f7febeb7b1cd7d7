"""Building blocks of every network: residual block, up- and down-sampling, timestep embedding, zero init.

Sources: Rombach et al. 2022 (arXiv:2112.10752), appendix E; Dhariwal & Nichol 2021 (arXiv:2105.05233) for the
scale-shift norm and for resampling inside the residual block. The autoencoder uses the same residual block
without a timestep.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Shaped
from torch import Tensor, nn

LARGEST_KERNEL = 30 * 2**20  # bytes; glibc's allocator keeps memory for reuse in blocks of up to 32 MiB


def zero_init(module: nn.Module) -> nn.Module:
    """Set all parameters to zero: a branch that ends in `module` contributes nothing at first."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def add(branch: Float[Tensor, "*shape"], x: Float[Tensor, "*#shape"]) -> Float[Tensor, "*shape"]:
    """`branch + x`, in the memory of `branch` where no gradient needs it: that must be the caller's own."""
    if torch.is_grad_enabled() or branch.dtype != x.dtype:
        return branch + x
    return branch.add_(x)


def silu(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """`x * sigmoid(x)`, in place where no gradient needs `x`: that must be the caller's own."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def convolve(conv: nn.Module, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C2 H2 W2"]:
    """`conv(x)`, to the bit; a large kernel in pieces of its output channels where that is faster.

    On the CPU the kernel is brought into another order at each call. For that much memory the allocator takes
    new pages from the system each time, which takes longer than the convolution of a small picture.
    """
    if not isinstance(conv, nn.Conv2d) or not x.is_cpu or torch.is_grad_enabled():
        return conv(x)
    pieces = math.ceil(conv.weight.nbytes / LARGEST_KERNEL)
    if pieces == 1 or type(conv) is not nn.Conv2d:
        return conv(x)
    weights = conv.weight.chunk(pieces)
    biases = [None] * len(weights) if conv.bias is None else conv.bias.chunk(pieces)
    parts = [
        F.conv2d(x, weight, bias, conv.stride, conv.padding)
        for weight, bias in zip(weights, biases, strict=True)
    ]
    return torch.cat(parts, dim=1)


def repeat_rows(x: Shaped[Tensor, "B *shape"], rows: int) -> Shaped[Tensor, "N *shape"]:
    """`torch.cat([x] * R)` with R B = `rows`; itself where it has them, a view (not to be written) for B = 1.

    Raises ValueError where `rows` is no multiple of B.
    """
    if len(x) == rows:
        return x
    if rows % len(x):
        raise ValueError(f"a batch of {len(x)} cannot be repeated to {rows}: that must be a multiple")
    return x.expand(rows // len(x), *x.shape).flatten(0, 1)  # (R, B, ...) -> (R B, ...)


def timestep_embedding(
    t: Shaped[Tensor, " B"], dim: int, max_period: float = 10_000.0
) -> Float[Tensor, "B dim"]:
    """Features `[cos(t f_i), sin(t f_i)]` with `f_i = max_period^(-i / (dim/2))`, in float32."""
    half = dim // 2
    frequencies = torch.exp(
        -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half
    )
    angles = t.float()[:, None] * frequencies[None]
    features = torch.cat([angles.cos(), angles.sin()], dim=-1)  # (B, 2 * half)
    return F.pad(features, (0, dim - 2 * half))


class TimestepEmbedding(nn.Module):
    """The two-layer MLP on top of the sinusoidal features; also the MLP of a conditioning vector."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, out_dim)
        self.linear_2 = nn.Linear(out_dim, out_dim)

    def forward(self, features: Float[Tensor, "B in_dim"]) -> Float[Tensor, "B out_dim"]:
        return self.linear_2(F.silu(self.linear_1(features)))


class Downsample(nn.Module):
    """Halve the resolution by a strided 3x3 convolution.

    The UNet pads by one pixel on every side; the autoencoder (`asymmetric`) on the right and bottom only.
    """

    def __init__(self, channels: int, asymmetric: bool = False):
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H2 W2"]:
        return convolve(self.conv, F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)  # (B, C, H/2, W/2)


class Upsample(nn.Module):
    """Double the resolution by nearest neighbours, then a 3x3 convolution.

    Each output pixel sees only 2x2 different input pixels, so the two steps together are four 2x2
    convolutions of the small picture, one for each parity of the output's row and column: 16 products an
    input pixel instead of 36. Without gradients on the CPU that form is taken where it is the faster one.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H2 W2"]:
        adapt = getattr(self.conv, "adapt", None)  # what a LoRA adds
        if self.folds(x) and adapt is None:
            return self.folded(x)
        large = F.interpolate(x, scale_factor=2.0, mode="nearest")  # (B, C, 2H, 2W)
        return adapt(self.folded(x), large) if adapt is not None and self.folds(x) else self.conv(large)

    def folds(self, x: Float[Tensor, "B C H W"]) -> bool:
        """Whether `forward` takes the four small convolutions for this input.

        Summing the kernels pays only where there are many pixels, and in half precision it rounds once more;
        a convolution that was replaced by another module has no kernel to sum.
        """
        return (
            not torch.is_grad_enabled()
            and (type(self.conv) is nn.Conv2d or hasattr(self.conv, "adapt"))
            and x.device.type in ("cpu", "meta")
            and x.dtype in (torch.float32, torch.float64)
            and not torch.is_autocast_enabled("cpu")
            and x.shape[0] * x.shape[2] * x.shape[3] >= 512
        )

    def folded(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H2 W2"]:
        """Output row 2h + i is the sum over a of input row h - 1 + i + a times a 2-tap kernel, which is
        `(w0, w1 + w2)` for i = 0 and `(w0 + w1, w2)` for i = 1; columns alike."""
        height, width = x.shape[-2:]
        fold = x.new_tensor([[1, 0, 0], [0, 1, 1], [1, 1, 0], [0, 0, 1]])  # ((i a), 3)
        kernels = torch.kron(fold, fold) @ rearrange(self.conv.weight, "o c kh kw -> (kh kw) (o c)")
        kernels = rearrange(kernels, "(i a j b) (o c) -> i j o c a b", i=2, a=2, j=2, c=x.shape[1])
        padded = F.pad(x, (1, 1, 1, 1))
        last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        y = torch.empty(
            (x.shape[0], self.conv.out_channels, 2 * height, 2 * width),
            dtype=x.dtype,
            device=x.device,
            memory_format=torch.channels_last if last else torch.contiguous_format,
        )
        for i in range(2):
            for j in range(2):
                seen = padded[:, :, i : i + height + 1, j : j + width + 1]
                y[:, :, i::2, j::2] = F.conv2d(seen, kernels[i, j], self.conv.bias)  # (B, C, H, W)
        return y


class ResBlock(nn.Module):
    """Twice GroupNorm, SiLU, convolution, with the timestep embedding in between; identity or 1x1 shortcut.

    Args:
        time_dim: width of the timestep embedding; None for the autoencoder, which has none.
        scale_shift: the embedding scales and shifts the second norm (ADM) instead of being added before it.
        resample: "up" or "down" resamples inside the block (ADM), both the branch and the shortcut.
        eps: 1e-5 in the UNet, 1e-6 in the autoencoder, as in the original code.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        time_dim: int | None,
        *,
        groups: int = 32,
        eps: float = 1e-5,
        scale_shift: bool = False,
        resample: str | None = None,
        dropout: float = 0.0,
        zero_last: bool = True,
    ):
        super().__init__()
        self.scale_shift = scale_shift
        self.resample = resample
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_proj = nn.Linear(time_dim, out_channels * (2 if scale_shift else 1)) if time_dim else None
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.dropout = nn.Dropout(dropout)
        conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv2 = zero_init(conv2) if zero_last else conv2
        self.shortcut = (
            nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        )

    def forward(
        self, x: Float[Tensor, "B C H W"], emb: Float[Tensor, "B_emb time_dim"] | None = None
    ) -> Float[Tensor, "B C2 H2 W2"]:
        """`emb`: one row for each of x, or for several of them where those repeat, as in `repeat_rows`."""
        h = silu(self.norm1(x))
        if self.resample == "up":
            h, x = (F.interpolate(y, scale_factor=2.0, mode="nearest") for y in (h, x))  # (B, C, 2H, 2W)
        elif self.resample == "down":
            h, x = (F.avg_pool2d(y, 2) for y in (h, x))  # (B, C, H/2, W/2)
        h = convolve(self.conv1, h)
        if self.time_proj is None:
            h = self.norm2(h)
        else:
            assert emb is not None, "a residual block with a timestep needs its embedding"
            projected = repeat_rows(self.time_proj(F.silu(emb)), len(h))[:, :, None, None]  # (B, C2, 1, 1)
            if self.scale_shift:
                scale, shift = projected.chunk(2, dim=1)
                h = self.norm2(h) * (1 + scale) + shift
            else:
                h = self.norm2(add(h, projected))
        return add(convolve(self.conv2, self.dropout(silu(h))), self.shortcut(x))
