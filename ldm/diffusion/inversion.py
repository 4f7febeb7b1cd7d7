"""DDIM inversion: from a picture up to the noise that samples to it (Song et al. 2021, section 5.4).

The mirror image of `samplers.py`: a generator over rising levels. Its end, given to `ddim` or `euler` on the
same levels the other way round, comes back to the picture.
"""

from collections.abc import Iterator

from jaxtyping import Float
from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.process import to_alpha_bar_scale, to_sigma_scale
from ldm.diffusion.step import FAR, Step, levels, toward


def ddim_invert(
    denoise: Denoise,
    x: Float[Tensor, "B ..."],
    sigmas: Float[Tensor, "levels"],
    *,
    iterations: int = 1,
) -> Iterator[Step]:
    """Solve DDIM's step backwards, x_next = x + (sigma_next - sigma) eps(x_next, sigma_next), step by step.

    x: at sigmas[0], which is 0 for a picture's latents. sigmas: (steps + 1,) rising levels, a sampling grid
    flipped. iterations: evaluations a step. The first takes for x_next the point that equals x in the
    network's scale, which is DDIM inversion as it is commonly done; each further one is a fixed-point
    iteration, and brings the inverse nearer to exact. Raises ValueError for iterations below 1 and for
    levels that do not rise.
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    if not bool((sigmas.diff() > 0).all()):
        raise ValueError("inversion goes up: sigmas must rise; flip the grid")
    for i, (sigma, sigma_next) in levels(sigmas):
        x_next = to_sigma_scale(to_alpha_bar_scale(x, sigma), sigma_next)
        for _ in range(iterations):
            x0 = denoise(x_next, sigma_next)
            if sigma_next > FAR and sigma > 0:  # the same equation; this form's iteration converges here
                x_next = toward(x, x0, sigma, sigma_next)
            else:
                x_next = x + (sigma_next - sigma) * (x_next - x0) / sigma_next
        x = x_next
        yield Step(i, sigma_next, x, x0)
