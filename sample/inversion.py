"""How well a model inverts a picture: up to the noise that samples to it, back again, and what was lost.

DDIM inversion (Song et al. 2021, arXiv:2010.02502, section 5.4) by `ldm/diffusion/inversion.py`, then DDIM on
the same levels. The noise is what edits start from that should keep a picture's layout; it is worth as much
as the way back is exact.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.inversion import ddim_invert
from ldm.diffusion.process import at_least_float32
from ldm.diffusion.samplers import ddim
from ldm.diffusion.step import Step
from ldm.metrics import psnr


@dataclass(frozen=True)
class Inverted:
    """The noise x at the highest level (sigma-scale), the latents it samples back to, and the error of these.

    rmse: of the latents, of each picture. psnr: of the decoded pictures against the decoded latents, in dB;
    None where nothing was decoded.
    """

    noise: Float[Tensor, "B ..."]
    back: Float[Tensor, "B ..."]
    rmse: Float[Tensor, " B"]
    psnr: Float[Tensor, " B"] | None = None


@torch.no_grad()
def invert_and_return(
    denoise: Denoise,
    latents: Float[Tensor, "B C h w"],
    sigmas: Float[Tensor, "levels"],
    iterations: int = 1,
    *,
    back: Denoise | None = None,
    decode: Callable[[Tensor], Tensor] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Inverted:
    """Invert clean latents along a sampling grid (falling, to 0) and sample them back.

    denoise: of the prompt that describes the picture, best without guidance, which makes inversion inexact.
    back: another denoiser for the way back, such as a guided or edited one; by default the same.
    iterations: see `ddim_invert`; each costs an evaluation a step. decode: latents to images in [-1, 1], for
    the PSNR. progress: called after each step with (steps done, steps both ways).
    Raises ValueError for a grid that does not fall to 0 from a finite level, iterations below 1, and where
    the noise or the way back is not finite.
    """
    if len(sigmas) < 2 or float(sigmas[-1]) != 0 or not bool(torch.isfinite(sigmas).all()):
        raise ValueError(
            f"inversion needs levels that fall to 0 from a finite one, got {sigmas[0]:g} to {sigmas[-1]:g}"
        )
    start, steps = at_least_float32(latents), len(sigmas) - 1

    def end(way: Iterator[Step], done: int, direction: str) -> Tensor:
        x = start
        for step in way:
            x = step.x
            if not bool(torch.isfinite(x).all()):
                raise ValueError(
                    f"latents are not finite after step {step.index + 1} of {steps} on the way {direction}; "
                    "try guidance 1, fewer iterations, or float32"
                )
            if progress is not None:
                progress(done + step.index + 1, 2 * steps)
        return x

    noise = end(ddim_invert(denoise, start, sigmas.flip(0), iterations=iterations), 0, "to noise")
    found = end(ddim(back or denoise, noise, sigmas), steps, "back")
    rmse = (found - start).square().flatten(1).mean(dim=1).sqrt()  # (B,)
    return Inverted(noise, found, rmse, None if decode is None else psnr(decode(start), decode(found)))
