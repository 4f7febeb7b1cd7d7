"""Vector quantisation: each latent vector becomes the nearest of n learned codes (van den Oord et al. 2017,
arXiv:1711.00937, section 3, eq. 1 to 3; Esser et al. 2021, arXiv:2012.09841, section 3.1).

    z_q = e_k,  k = argmin_j |z - e_j|^2,  gradient of z_q taken as that of z ("straight-through")
    loss = |sg(z) - e_k|^2 + beta |z - sg(e_k)|^2

The first term moves the codes to the encoder's answers, the second the answers to the codes; both are means
here. `AutoencoderVQ` (autoencoder.py) puts this between its encoder and its decoder. `CodeUsage` brings codes
that nothing is near to any more back to life while it trains.
"""

from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

CHUNK = 2**22  # distances held at once: 16 MiB in float32


class Quantized(NamedTuple):
    """What the quantiser makes of latents (B, C, h, w)."""

    z_q: Tensor  # (B, C, h, w), the codes' values exactly, with the gradient of the latents
    indices: Tensor  # (B, h, w) int64, which code
    loss: Tensor  # (B,) float32 or finer, mean over C, h, w; reaches the codes and the latents


class VectorQuantizer(nn.Module):
    """A codebook of `size` codes of `dim` values.

    beta: weight of the second term of the loss. legacy: beta stands before the first term instead, as in the
    original code, with which every released model was trained.
    """

    def __init__(self, size: int, dim: int, beta: float = 0.25, legacy: bool = True):
        super().__init__()
        self.beta = beta
        self.legacy = legacy
        self.embedding = nn.Embedding(size, dim)
        nn.init.uniform_(self.embedding.weight, -1 / size, 1 / size)

    def forward(self, z: Float[Tensor, "B C h w"]) -> Quantized:
        """The nearest code at each position."""
        exact = z.to(torch.promote_types(z.dtype, torch.float32))
        indices = self.nearest(exact)
        codes = rearrange(self.embedding(indices), "b h w c -> b c h w").to(exact.dtype)
        to_codes = (exact.detach() - codes).square().mean(dim=(1, 2, 3))  # (B,), moves the codes
        to_latents = (exact - codes.detach()).square().mean(dim=(1, 2, 3))  # (B,), moves the latents
        loss = self.beta * to_codes + to_latents if self.legacy else to_codes + self.beta * to_latents
        # z - z is 0 with the gradient of z, and NaN where z is not finite: a broken latent stays visible
        return Quantized(codes.detach().to(z.dtype) + (z - z.detach()), indices, loss)

    def lookup(self, indices: Int[Tensor, "B h w"]) -> Float[Tensor, "B C h w"]:
        """The codes by their numbers. Raises ValueError for a number outside the codebook."""
        size = self.embedding.num_embeddings
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < size:
            raise ValueError(
                f"code numbers must be in 0..{size - 1}, got {int(indices.min())}..{int(indices.max())}"
            )
        return rearrange(self.embedding(indices), "b h w c -> b c h w")

    @torch.no_grad()
    def nearest(self, z: Float[Tensor, "B C h w"]) -> Int[Tensor, "B h w"]:
        """`argmin_j |z - e_j|^2`, some positions at a time: all of them by all codes would be gigabytes."""
        with torch.autocast(z.device.type, enabled=False):  # which would round the products to 16 bits
            codes = self.embedding.weight.to(z.dtype)
            centre = codes.mean(dim=0)  # far from the origin the squares would cancel
            codes = codes - centre
            squares = codes.square().sum(dim=1)
            positions = rearrange(z, "b c h w -> (b h w) c") - centre
            parts = positions.split(max(1, CHUNK // len(codes)))
            # |z - e|^2 without |z|^2, which all codes have in common
            indices = torch.cat(
                [torch.addmm(squares, part, codes.T, alpha=-2).argmin(dim=1) for part in parts]
            )
        return rearrange(indices, "(b h w) -> b h w", h=z.shape[2], w=z.shape[3])


def perplexity(indices: Int[Tensor, "B h w"], size: int) -> Float[Tensor, ""]:
    """How many of `size` codes are in use: exp of the entropy of their frequencies, in 1..size."""
    frequencies = torch.bincount(indices.flatten(), minlength=size) / indices.numel()
    return torch.exp(-torch.special.xlogy(frequencies, frequencies).sum())


def usage(indices: Int[Tensor, "B h w"], size: int) -> Float[Tensor, ""]:
    """The share of `size` codes that occur at all, in 0..1."""
    return (torch.bincount(indices.flatten(), minlength=size) > 0).float().mean()


class CodeUsage(nn.Module):
    """Counts for how many training steps in a row each code was nobody's nearest, and replaces dead ones.

    A code far from all latents gets no gradient and stays where it is; put onto a latent it takes part again
    (the random restart of Dhariwal et al. 2020, arXiv:2005.00341, section 3). revive_after: steps without use
    after which a code is dead. The counters are a buffer, so that they are saved and resumed with the run.
    """

    idle: Tensor  # (K,) int64

    def __init__(self, size: int, revive_after: int):
        super().__init__()
        self.revive_after = revive_after
        self.register_buffer("idle", torch.zeros(size, dtype=torch.int64))

    def dead(self) -> int:
        """How many codes are dead."""
        return int((self.idle >= self.revive_after).sum())

    @torch.no_grad()
    def revive(
        self, codebook: Float[Tensor, "K C"], z: Float[Tensor, "B C h w"], rng: torch.Generator
    ) -> int:
        """Overwrite the dead rows of `codebook` by the latents at random places, each place once; how many.

        Where there are fewer places than dead codes, those go first that have been dead for longest. Latents
        that are not finite replace nothing: a training step that fails must not ruin the codes.
        """
        if not bool(torch.isfinite(z).all()):
            return 0
        dead = torch.argsort(self.idle, descending=True, stable=True)[: self.dead()]
        latents = rearrange(z, "b c h w -> (b h w) c")
        places = torch.randperm(len(latents), generator=rng)[: len(dead)].to(z.device)
        revived = dead[: len(places)]
        codebook[revived] = latents[places].to(codebook.dtype)
        self.idle[revived] = 0
        return len(revived)

    @torch.no_grad()
    def count(self, indices: Int[Tensor, "B h w"], part: int = 0) -> None:
        """Note the codes used in one part of a step's batch; the first part, 0, begins the step."""
        if part == 0:
            self.idle += 1
        self.idle[indices.flatten()] = 0
