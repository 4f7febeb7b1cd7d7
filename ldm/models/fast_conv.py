"""Winograd's form of 3x3 convolutions, for inference on the CPU (Lavin & Gray 2015, arXiv:1509.09308).

A stride-1 3x3 convolution takes 9 products an output pixel. Cut into tiles of 4x4 outputs, which see 6x6
inputs, it takes 36 products a tile, 2.25 a pixel: Y = A^T [(G g G^T) * (B^T d B)] A (equation 8; * is
element by element and is summed over the input channels). With the transforms as Kronecker products on
flattened tiles that is three matrix products, (A x A)^T [(G x G) g * (B x B)^T d], the middle one a batched
product of 36 matrices (tiles, C_in) @ (C_in, C_out), which holds most of the work. The price is memory, four
times that of the kernel, and rounding, 1e-6 relative in float32.

`fast_convolutions` replaces those layers of a UNet or a decoder where this pays, within a budget of memory;
the model itself stays as it was. Nothing else here knows of it.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from ldm.models.blocks import Upsample

OUT, KERNEL = 4, 3  # F(4x4, 3x3)
TILE = OUT + KERNEL - 1  # inputs that a tile sees, in each direction
PRODUCTS = TILE**2
POINTS = (0.0, 0.75, -0.75, 1.5, -1.5)  # half the rounding error of the paper's (0, 1, -1, 2, -2), measured
AT_ONCE = 128  # tiles: enough for full speed of the product, few enough for the cache
M = TypeVar("M", bound=nn.Module)


def winograd_matrices(
    points: Sequence[float] = POINTS,
) -> tuple[Float[Tensor, "4 6"], Float[Tensor, "6 3"], Float[Tensor, "6 6"]]:
    """A^T, G and B^T in float64, of `y_k = sum_l d_{k+l} g_l = A^T [(G g) * (B^T d)]`, k < 4, l < 3.

    A product of polynomials of degree 5 is known from its values at five points p_i and its leading
    coefficient: `p(x) q(x) = sum_i p(p_i) q(p_i) / N_i M_i(x) + (leading of p) (leading of q) M(x)` with
    `M(x) = prod_j (x - p_j)`, `M_i = M / (x - p_i)` and `N_i = M_i(p_i)` (Toom and Cook). With p = x^k and
    q = g, and each power x^j read as d_j, that is y_k: A^T has the powers of the points, G has those over
    N_i, and B^T the coefficients of the M_i and of M.
    """
    p = torch.tensor(points, dtype=torch.float64)
    b = torch.zeros(TILE, TILE, dtype=torch.float64)
    for i in range(TILE):
        others = [point for j, point in enumerate(points) if j != i]  # all of them in the last row, M
        coefficients = torch.ones(1, dtype=torch.float64)  # from the constant up
        for point in others:
            coefficients = F.pad(coefficients, (1, 0)) - point * F.pad(coefficients, (0, 1))
        b[i, : len(coefficients)] = coefficients
    norms = torch.stack([(p[i] - torch.cat([p[:i], p[i + 1 :]])).prod() for i in range(len(p))])
    leading = torch.eye(TILE, dtype=torch.float64)[-1:]  # (1, 6)
    a = torch.cat([p[:, None] ** torch.arange(OUT), leading[:, -OUT:]])  # (6, 4)
    g = torch.cat([p[:, None] ** torch.arange(KERNEL) / norms[:, None], leading[:, -KERNEL:]])  # (6, 3)
    return a.T.contiguous(), g, b


class WinogradConv2d(nn.Module):
    """A 3x3 `nn.Conv2d` (stride 1, padding 1) in Winograd's form: its kernel, transformed, and its bias.

    `weight` is a buffer of the convolution's dtype, transformed in float64: 4 times the memory, without
    gradient, not in the state dict. Any height and width; the result has the input's memory format.
    """

    weight: Tensor  # (36, C, C2)
    to_tile: Tensor
    from_tile: Tensor

    def __init__(self, conv: nn.Conv2d):
        """Raises ValueError for a convolution of another kind."""
        super().__init__()
        if not is_eligible(conv):
            raise ValueError(
                f"Winograd's form is of 3x3 convolutions with stride 1 and padding 1, not of {conv}"
            )
        a, g, b = winograd_matrices()
        weight = conv.weight.detach()
        twice = torch.kron(g, g).to(weight.device)  # (36, 9)
        kernel = weight.new_empty(PRODUCTS, conv.in_channels, conv.out_channels)
        taps = weight.flatten(1).t().contiguous().unflatten(0, (conv.in_channels, -1))  # (C, 9, C2)
        for some in range(0, conv.in_channels, 32):  # all of it in float64 would be large
            kernel[:, some : some + 32] = (twice @ taps[some : some + 32].double()).transpose(0, 1)
        self.register_buffer("weight", kernel, persistent=False)
        self.register_buffer("to_tile", torch.kron(b, b).to(weight), persistent=False)
        self.register_buffer("from_tile", torch.kron(a, a).to(weight), persistent=False)
        self.bias = conv.bias

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[2]}, bias={self.bias is not None}"

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C2 H W"]:
        (pictures, _, height, width), last = x.shape, x.is_contiguous(memory_format=torch.channels_last)
        rows, columns = -(-height // OUT), -(-width // OUT)  # of tiles
        right, bottom = OUT * columns - width + 1, OUT * rows - height + 1
        if last:
            padded = F.pad(rearrange(x, "b c h w -> b h w c"), (0, 0, 1, right, 1, bottom))
        else:
            padded = swapped(F.pad(x, (1, right, 1, bottom)).flatten(2))
            padded = padded.unflatten(1, (OUT * rows + 2, OUT * columns + 2))  # (B, H + 2, W + 2, C)
        tiles = padded.unfold(1, TILE, OUT).unfold(2, TILE, OUT)  # (B, rows, columns, C, 6, 6), a view
        y = x.new_empty(pictures, rows, OUT, columns, OUT, self.weight.shape[2])
        rows_at_once = min(rows, max(1, AT_ONCE // columns))
        pictures_at_once = max(1, AT_ONCE // (rows * columns))
        for first in range(0, pictures, pictures_at_once):
            for row in range(0, rows, rows_at_once):
                part = slice(first, first + pictures_at_once), slice(row, row + rows_at_once)
                y[part] = self._tiles(tiles[part])
        y = y.view(pictures, OUT * rows, OUT * columns, -1)
        if last:
            return rearrange(y, "b h w c -> b c h w")[:, :, :height, :width]
        y = swapped(y.flatten(1, 2)).unflatten(2, (OUT * rows, OUT * columns))  # (B, C2, H, W)
        return y[:, :, :height, :width]

    def _tiles(self, tiles: Float[Tensor, "B r w C 6 6"]) -> Float[Tensor, "B r 4 w 4 C2"]:
        pictures, rows, columns = tiles.shape[:3]
        d = rearrange(tiles, "b r w c i j -> (b r w) (i j) c")
        d = (self.to_tile @ d).transpose(0, 1)  # (36, tiles, C)
        products = torch.bmm(d, self.weight)  # (36, tiles, C2)
        y = self.from_tile @ products.flatten(1)  # (16, tiles * C2)
        y = y.view(OUT, OUT, pictures, rows, columns, -1)
        if self.bias is not None:
            y += self.bias
        return rearrange(y, "i j b r w c -> b r i w j c")


def swapped(x: Float[Tensor, "B M N"]) -> Float[Tensor, "B N M"]:
    """`x.transpose(1, 2)` in memory of its own; torch copies matrices several times as fast as batches."""
    y = x.new_empty(len(x), x.shape[2], x.shape[1])
    for i in range(len(x)):
        y[i] = x[i].t()
    return y


def is_eligible(module: nn.Module) -> bool:
    """Whether `WinogradConv2d` can stand for this module."""
    return (
        type(module) is nn.Conv2d
        and module.kernel_size == (3, 3)
        and module.stride == module.dilation == (1, 1)
        and module.padding in ((1, 1), "same")
        and module.padding_mode == "zeros"
        and module.groups == 1
    )


# --- which layers -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConvShape:
    """What a layer's cost depends on. `folded`: it stands in an `Upsample` that needs fewer products.

    Costs are in products of the direct form at full speed. Their constants are fitted to one core of an AMD
    EPYC (Zen 4) with torch 2.15 and contiguous pictures; benchmarks/convolutions.py shows rule and truth. A
    rule and not a timing decides, so that the same model on the same input is always the same function, bit
    for bit, and that the choice takes no time.
    """

    in_channels: int
    out_channels: int
    pictures: int
    height: int
    width: int
    folded: bool = False

    @property
    def tiles(self) -> int:
        return self.pictures * -(-self.height // OUT) * -(-self.width // OUT)

    @property
    def bytes(self) -> int:
        """Memory of the transformed kernel."""
        return 4 * PRODUCTS * self.in_channels * self.out_channels

    @property
    def direct(self) -> float:
        """Cost as it is: the kernel must be read however few the pixels are."""
        pixels = self.pictures * self.height * self.width
        taps = 4.5 if self.folded else 9.0  # 4, and a copy
        return taps * self.in_channels * self.out_channels * (pixels + 100)

    @property
    def winograd(self) -> float:
        """Cost of the product, whose kernel is four times as large, of both transforms, of copies, and of any
        call, however small."""
        product = PRODUCTS * self.in_channels * self.out_channels * (self.tiles + 19)
        ways = PRODUCTS * (PRODUCTS * self.in_channels + OUT**2 * self.out_channels) * self.tiles
        copied = OUT**2 * (self.in_channels + self.out_channels) * self.tiles
        return product + 6.0 * ways + 130.0 * copied + 4.5e7

    @property
    def gain(self) -> float:
        """How many times as fast Winograd's form is expected to be."""
        return self.direct / self.winograd


@dataclass(frozen=True)
class FastConvolutions:
    """What `fast_convolutions` did: which layers it replaced, by name, and all that it could have."""

    replaced: dict[str, ConvShape]
    eligible: dict[str, ConvShape]

    @property
    def bytes(self) -> int:
        """Memory of all transformed kernels."""
        return sum(shape.bytes for shape in self.replaced.values())

    @property
    def gain(self) -> float:
        """How many times as fast all eligible layers together are expected to be."""
        before = sum(shape.direct for shape in self.eligible.values())
        saved = sum(shape.direct - shape.winograd for shape in self.replaced.values())
        return before / (before - saved) if before else 1.0

    def __str__(self) -> str:
        return (
            f"{len(self.replaced)} of {len(self.eligible)} 3x3 convolutions in Winograd's form, "
            f"{self.bytes / 1e9:.2f} GB, together {self.gain:.2f} times as fast (expected)"
        )


def fast_convolutions(
    module: M, gigabytes: float, *inputs: Any, least: float = 1.1
) -> tuple[M, FastConvolutions]:
    """A module that computes the same with some of its 3x3 convolutions in Winograd's form, and which ones.

    The result shares every parameter and buffer with `module`, which is left as it was; only the transformed
    kernels are new, at most `gigabytes` (10^9 bytes) of them. Layers are taken by time saved per byte, those
    first whose input is large. Float32 on the CPU only: other layers are left alone. The kernels are those of
    this moment, so load weights, LoRA and the like before; the result is for inference and not for saving.

    Args:
        inputs: arguments of `module` of the shapes it will see: a pass without data over them finds the
            layers' shapes. The result works for other shapes too.
        least: gain below which a layer is not worth its memory.
    Raises ValueError for a negative or infinite budget.
    """
    if not 0 <= gigabytes < float("inf"):
        raise ValueError(f"the memory for fast convolutions must be 0 GB or more, got {gigabytes:g}")
    eligible = conv_shapes(module, *inputs)
    worth = {name: shape for name, shape in eligible.items() if shape.gain >= least}
    left, replaced = gigabytes * 1e9, {}
    for name, shape in sorted(
        worth.items(), key=lambda item: (item[1].winograd - item[1].direct) / item[1].bytes
    ):
        if shape.bytes <= left:
            replaced[name], left = shape, left - shape.bytes
    substitutes: dict[int, Any] = _itself(module)
    for name in replaced:
        conv = module.get_submodule(name)
        assert isinstance(conv, nn.Conv2d), f"{name} is a convolution"
        substitutes[id(conv)] = WinogradConv2d(conv).train(conv.training)
    return copy.deepcopy(module, substitutes), FastConvolutions(replaced, eligible)


def kernel_bytes(module: nn.Module) -> int:
    """Memory of the transformed kernels that a module has."""
    layers = (layer for layer in module.modules() if isinstance(layer, WinogradConv2d))
    return sum(layer.weight.nbytes for layer in layers)


def conv_shapes(module: nn.Module, *inputs: Any, device: str = "cpu") -> dict[str, ConvShape]:
    """The float32 layers on the device that Winograd's form fits, by name, with what they see of `inputs`.

    Found in a pass over a copy of the module without data (device "meta"). Layers that the pass does not
    reach are left out; one that it reaches twice counts with its last shape.
    """
    without = {key: tensor.to("meta") for key, tensor in _itself(module).items()}
    hollow = copy.deepcopy(module, dict(without))
    shapes: dict[str, ConvShape] = {}
    for name, layer in hollow.named_modules():
        conv, prefix = (layer.conv, f"{name}.conv") if isinstance(layer, Upsample) else (layer, name)
        if not is_eligible(conv):
            continue
        weight = module.get_submodule(prefix).weight
        if weight.dtype != torch.float32 or weight.device.type != device:
            continue

        def note(layer: nn.Module, args: tuple[Tensor, ...], name: str = prefix, conv: Any = conv) -> None:
            batch, _, height, width = args[0].shape
            scale = 2 if isinstance(layer, Upsample) else 1
            folded = isinstance(layer, Upsample) and layer.folds(args[0])
            shapes[name] = ConvShape(
                conv.in_channels, conv.out_channels, batch, scale * height, scale * width, folded
            )

        layer.register_forward_pre_hook(note)
    with torch.no_grad():
        hollow(*(value.to("meta") if isinstance(value, Tensor) else value for value in inputs))
    return shapes


def _itself(module: nn.Module) -> dict[int, Any]:
    """For `copy.deepcopy`: that each parameter and buffer of the module is its own copy."""
    return {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
