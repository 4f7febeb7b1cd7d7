"""Prompts to pictures (Rombach et al. 2022, arXiv:2112.10752, figure 3): a model's parts and the sampling.

`Pipeline` is what `from sample import Pipeline` gives: the parts of a model (`parts.py`), `stream` to sample
one batch step by step (`stream.py`), and on it whole calls that return pictures. The commands use `stream`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sample.control import batch_of
from sample.embeddings import add_embedding, remove_embedding
from sample.loras import add_lora
from sample.parts import Parts
from sample.settings import Sampling
from sample.start import start
from sample.stream import stream


class Pipeline(Parts):
    """A model, ready to sample. `how` of its methods are the fields of `settings.Sampling`."""

    start = start
    stream = stream
    add_embedding = add_embedding
    remove_embedding = remove_embedding
    add_lora = add_lora

    def txt2img(
        self,
        prompts: str | Sequence[str],
        *,
        first: int = 0,
        batch: int = 4,
        progress: Callable[[int, int], None] | None = None,
        **how: Any,
    ) -> Float[Tensor, "N 3 H W"]:
        """A picture a prompt, in their order: float32 in [-1, 1] on the CPU. A prompt n times gives n of it.

        Args:
            first: number of the first picture: picture i draws its noise as number `first + i` of `seed`.
            batch: pictures made at once; changes no picture.
            progress: called after each step with (steps done, steps in all), over all batches.
            how: seed, steps, sampler, guidance, negative, size, controls, ...: the fields of `Sampling`; a
                control's hints are one for all pictures or one a picture.

        Raises ValueError for no prompt, batch below 1, and as `stream`.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        return self._pictures(prompts, None, {}, first=first, batch=batch, progress=progress, how=how)

    def img2img(
        self,
        images: Float[Tensor, "... 3 H W"],
        prompts: str | Sequence[str],
        *,
        strength: float | int = 0.6,
        exact_steps: bool = False,
        first: int = 0,
        batch: int = 4,
        progress: Callable[[int, int], None] | None = None,
        **how: Any,
    ) -> Float[Tensor, "N 3 H W"]:
        """Pictures made anew from given ones, as `prompts` say; the rest as in `txt2img`, but for the size.

        Args:
            images: float32 in [-1, 1], one a prompt, or one for all; sides as `latent_shape` wants them.
            strength: 0 is the picture through the autoencoder, 1 forgets it (it is `txt2img`, bit for bit).
                Between, its latents, drawn from the posterior, get the noise of the level from which
                round-half-up(strength steps) steps of the grid remain, at least one, and these are taken.
            exact_steps: take `steps` steps below that level.

        Raises ValueError as `txt2img`, for a strength outside 0..1 and for an illegal size of the images.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        images = one_a_prompt(images, len(prompts))
        options = {"strength": strength, "exact_steps": exact_steps}
        return self._pictures(prompts, images, options, first=first, batch=batch, progress=progress, how=how)

    def inpaint(
        self,
        images: Float[Tensor, "... 3 H W"],
        mask: Bool[Tensor, "1 Hm Wm"],
        prompts: str | Sequence[str],
        *,
        strength: float | int = 1.0,
        exact_steps: bool = False,
        resample: int = 1,
        paste: bool = True,
        first: int = 0,
        batch: int = 4,
        progress: Callable[[int, int], None] | None = None,
        **how: Any,
    ) -> Float[Tensor, "N 3 H W"]:
        """Pictures painted anew where the mask is True; the rest as in `img2img`.

        Args:
            mask: of the images' size, one for all. A model trained for inpainting reads it; with any other,
                each latent cell that it does not touch is kept.
            strength: 1 paints from pure noise, less keeps of what is under the mask.
            resample: how often each step is taken, see `editing.resampled`.
            paste: put the pixels of the images back where the mask is False.

        Raises ValueError as `img2img`, for a mask of another size, and for resample below 1.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        images = one_a_prompt(images, len(prompts))
        options = {"strength": strength, "exact_steps": exact_steps, "resample": resample, "mask": mask}
        made = self._pictures(prompts, images, options, first=first, batch=batch, progress=progress, how=how)
        return torch.where(mask, made, images.float().cpu()) if paste else made

    def _pictures(
        self,
        prompts: Sequence[str],
        images: Float[Tensor, "M 3 H W"] | None,
        options: dict[str, Any],
        *,
        first: int,
        batch: int,
        progress: Callable[[int, int], None] | None,
        how: dict[str, Any],
    ) -> Float[Tensor, "N 3 H W"]:
        """All batches; images: to start from, one or one a prompt; options: of `start`."""
        sampling, parts, made = Sampling(**how), batches(len(prompts), batch), []
        common: dict[str, Any] = {"seed": sampling.seed, "variation": sampling.variation}
        for done, part in enumerate(parts):
            given, latents, steps = None, torch.empty(0), sampling.steps
            if images is not None:
                those = images if len(images) == 1 else images[part.start : part.stop]
                numbers = range(first + part.start, first + part.stop)
                given = self.start(those, numbers, **options, **common)
                assert given.latents is not None, "made of pictures"
                latents, steps = given.latents, given.steps(steps)  # the latents are the result of no step
            texts = prompts[part.start : part.stop]
            own = {**how, "controls": batch_of(sampling.controls, part, len(prompts))}
            for step in self.stream(texts, first=first + part.start, start=given, **own):
                latents = step.sample
                if progress is not None:
                    progress(done * steps + step.index + 1, len(parts) * steps)
            made.append(self.decode(latents))
        return torch.cat(made)


def one_a_prompt(images: Float[Tensor, "... 3 H W"], count: int) -> Float[Tensor, "M 3 H W"]:
    """Images (3, H, W) or (M, 3, H, W) as the latter, M being 1 or `count`. Raises ValueError else."""
    images = images[None] if images.ndim == 3 else images
    if len(images) not in (1, count):
        raise ValueError(f"{len(images)} images for {count} prompts; expected one, or one a prompt")
    return images


def batches(count: int, batch: int) -> list[range]:
    """0..count-1 in runs of `batch`, the last maybe shorter. Raises ValueError where either is below 1."""
    if count < 1 or batch < 1:
        raise ValueError(
            f"at least one picture and a batch of at least 1 are needed, got {count} and {batch}"
        )
    return [range(start, min(start + batch, count)) for start in range(0, count, batch)]
