"""A model's parts together: prompts to pictures (Rombach et al. 2022, arXiv:2112.10752, figure 3).

`Pipeline` holds a UNet, an autoencoder, a noise schedule and, where the model reads text, a text tower with
its tokenizer. In the walk it is the one file between a command and the sampler: `stream` turns prompts into
conditioning and noise, hands both to a sampler of `ldm/diffusion/samplers.py` and yields what that yields;
`decode` makes pictures of the last step's latents.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from ldm.config import to_dict
from ldm.device import pick_device
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.editing import concatenated, cut, keep_known, resampled, slerp
from ldm.diffusion.grids import make_grid
from ldm.diffusion.guidance import classifier_free
from ldm.diffusion.process import to_sigma_scale
from ldm.diffusion.samplers import Step, check_options, find_sampler
from ldm.diffusion.schedule import DiffusionConfig, Schedule
from ldm.models.autoencoder import Autoencoder
from ldm.models.unet import UNet
from ldm.seeding import generator
from ldm.weights.checkpoint import Checkpoint
from ldm.weights.folder import PART_FILES, save_part
from ldm.weights.reading import open_checkpoint
from sample.model import CONTEXTS, ContextEncoder, check_fit, find_model, make_tokenizer, reads_text

EXTRA_CHANNELS = {5: "mask and masked picture: it is for inpainting", 1: "depth"}
Variation = tuple[int, float | int]  # another seed and how far towards it, 0 to 1


@dataclass(frozen=True)
class Start:
    """What a batch starts from and keeps, from `Pipeline.start`: one picture a prompt.

    latents: of the pictures. strength, exact_steps: how much of the way is taken, see `editing.cut`.
    mask: for a plain model, where it paints anew; elsewhere the latents are kept. channels: for a model
    trained for inpainting, what it reads besides: mask and latents of the masked pictures. resample: see
    `editing.resampled`.
    """

    latents: Float[Tensor, "B C h w"]
    strength: float | int = 1.0
    exact_steps: bool = False
    mask: Bool[Tensor, "B 1 h w"] | None = None
    channels: Float[Tensor, "B D h w"] | None = None
    resample: int = 1

    def steps(self, steps: int) -> int:
        """How many steps will be taken where `steps` are asked for."""
        return cut(steps, self.strength, self.exact_steps)[1]

    def grid(self, steps: int, timesteps: int) -> tuple[int, int]:
        """(steps of the whole grid, steps taken). Raises ValueError where the model has too few timesteps."""
        whole, taken = cut(steps, self.strength, self.exact_steps)
        if self.exact_steps and whole > timesteps >= steps:
            raise ValueError(
                f"{steps} exact steps at strength {self.strength:g} are the end of {whole} steps, and the "
                f"model has {timesteps} timesteps; take fewer steps, more strength or no exact steps"
            )
        return whole, taken


class Pipeline:
    """The parts of a text-to-image model, ready to sample.

    unet, autoencoder, text_encoder and tokenizer (both None where the model reads no text; of a
    class-conditional model the embedder, and class numbers are its prompts), schedule, device; checkpoint is
    what it was loaded from, None for modules that were handed over.
    """

    def __init__(
        self,
        unet: UNet,
        autoencoder: Autoencoder,
        text_encoder: ContextEncoder | None,
        diffusion: DiffusionConfig,
        *,
        device: str | torch.device = "auto",
        vocabulary: Path | None = None,
    ):
        """Take modules over as they are, in number format and in training or evaluation mode, to `device`.

        vocabulary: the file of the tokenizer that a BERT text tower needs. Raises ValueError where the parts
        do not fit each other.
        """
        width = None if text_encoder is None else text_encoder.config.width
        check_fit(unet.config, autoencoder.config, width)
        self.device = pick_device(str(device))
        self.unet = unet.to(self.device)
        self.autoencoder = autoencoder.to(self.device)
        self.text_encoder = None if text_encoder is None else text_encoder.to(self.device)
        self.tokenizer = None if text_encoder is None else make_tokenizer(text_encoder, vocabulary)
        self.schedule = Schedule(diffusion)
        self.checkpoint: Checkpoint | None = None

    @classmethod
    def load(
        cls,
        name_or_path: str | Path = "emoji",
        device: str = "auto",
        dtype: torch.dtype = torch.float32,
        *,
        kind: str | None = None,
        prediction: str | None = None,
        weights: str = "auto",
        vocabulary: str | Path | None = None,
        allow_nan: bool = False,
    ) -> "Pipeline":
        """A model by its shipped name, or by a path: our folder or run, a single file, a diffusers folder.

        Args:
            dtype: number format to compute in, whatever the files hold.
            kind, prediction, weights: where the files leave it open, see `open_checkpoint`.
            vocabulary: vocab.txt of a BERT text tower; by default beside the checkpoint.
            allow_nan: load weights that are not finite, with a warning.

        Raises ValueError or FileNotFoundError, in one line, as `find_model` and `open_checkpoint` do.
        """
        path = find_model(name_or_path)
        checkpoint = open_checkpoint(path, kind=kind, prediction=prediction, weights=weights)
        parts = {name: checkpoint.require(name) for name in ("unet", "autoencoder")}
        if reads_text(checkpoint.config.unet):
            name = next((name for name in CONTEXTS if name in checkpoint.parts), CONTEXTS[0])
            parts["context"] = checkpoint.require(name)
        diffusion = checkpoint.diffusion()  # may be a question, so it comes before gigabytes are read
        modules = {name: part.load(dtype, allow_nan) for name, part in parts.items()}
        pipeline = cls(
            modules["unet"],
            modules["autoencoder"],
            modules.get("context"),
            diffusion,
            device=device,
            vocabulary=Path(vocabulary) if vocabulary else checkpoint.path.parent / "vocab.txt",
        )
        pipeline.checkpoint = checkpoint
        return pipeline

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float16) -> None:
        """Write a model folder, each file atomically. Raises ValueError where a weight overflows `dtype`."""
        for module in (self.autoencoder, self.text_encoder, self.unet):
            if module is not None:
                file = next(file for file, kind in PART_FILES.values() if isinstance(module.config, kind))
                more = {"diffusion": to_dict(self.schedule.config)} if module is self.unet else {}
                save_part(Path(folder) / file, module, dtype, **more)

    @property
    def dtype(self) -> torch.dtype:
        """The number format the UNet computes in."""
        return self.unet.conv_in.weight.dtype

    def latent_shape(self, size: tuple[int, int] | None = None) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a picture of (W, H) pixels; None is the size the model was trained on.

        Raises ValueError, with the nearest legal size, where W or H is no positive multiple of what the two
        networks together divide by.
        """
        channels, factor = self.autoencoder.config.latent_channels, self.autoencoder.factor
        if size is None:
            return channels, self.unet.config.sample_size, self.unet.config.sample_size
        nearest, unit = self.legal_size(size), factor * self.unet.config.factor
        if nearest != size:
            raise ValueError(
                f"size {size[0]}x{size[1]}: sides must be multiples of {unit}; the nearest is "
                f"{nearest[0]}x{nearest[1]}"
            )
        return channels, size[1] // factor, size[0] // factor

    def legal_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """The nearest (W, H) whose sides are multiples of what the two networks together divide by."""
        unit = self.autoencoder.factor * self.unet.config.factor
        width, height = (max(unit, round(side / unit) * unit) for side in size)
        return width, height

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Float[Tensor, "N T D"]:
        """Hidden states of each prompt; "" is the unconditional one. Equal prompts are encoded once.

        Raises ValueError where the model reads no text.
        """
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError(f"this model reads no text, so a prompt must be empty; got {max(prompts)!r}")
        distinct = list(dict.fromkeys(prompts))
        context = self.text_encoder(self.tokenizer(distinct).to(self.device))
        return context[[distinct.index(prompt) for prompt in prompts]]

    def conditioning(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """What the UNet is told besides x and t, by keyword: nothing where the model reads no text."""
        unprompted = self.text_encoder is None and not any(prompts)
        return {} if unprompted else {"context": self.encode_prompts(prompts)}

    def noise(self, shape: tuple[int, ...], *keys: Sequence[int | str]) -> Float[Tensor, "B C h w"]:
        """Standard normal noise, each picture from the CPU generator of its key: the same in any batch."""
        return torch.stack([torch.randn(shape, generator=generator(*key)) for key in keys]).to(self.device)

    def draw(
        self,
        kind: str,
        shape: tuple[int, ...],
        seed: int,
        images: Sequence[int],
        *more: int,
        variation: Variation | None = None,
    ) -> Float[Tensor, "B C h w"]:
        """Noise of one kind for pictures by number; with a variation, part of the way to its seed's."""

        def of(seed: int) -> Tensor:
            keys: list[tuple[int | str, ...]] = [(seed, kind, i, *more) for i in images]
            return self.noise(shape, *keys)

        return of(seed) if variation is None else slerp(of(seed), of(variation[0]), variation[1])

    @property
    def inpaints(self) -> bool:
        """Whether the UNet reads a mask and masked latents besides, as Stable Diffusion's for inpainting.

        Raises ValueError where it reads other channels besides, which nothing here gives it.
        """
        config = self.unet.config
        more = config.in_channels - config.out_channels
        if more and not (more == 1 + config.out_channels and reads_text(config)):
            raise ValueError(
                f"this UNet reads {more} channels besides the latents, which a prompt alone does not give: "
                f"{EXTRA_CHANNELS.get(more, 'of a picture')}"
            )
        return more > 0

    @torch.no_grad()
    def encode(
        self,
        images: Float[Tensor, "M 3 H W"],
        seed: int,
        numbers: Sequence[int],
        kind: str = "encode",
        variation: Variation | None = None,
    ) -> Float[Tensor, "B C h w"]:
        """Latents drawn from the posterior of images in [-1, 1], with each picture's own noise, in float32.

        images: one a number, or one for all. Raises ValueError for an illegal size and for values that are
        not finite.
        """
        shape = self.latent_shape((images.shape[-1], images.shape[-2]))
        posterior = self.autoencoder.encode(images.to(self.autoencoder.post_quant_conv.weight))
        noise = self.draw(kind, shape, seed, numbers, variation=variation)
        latents = self.autoencoder.scale_latents(posterior.mode() + posterior.std * noise).float()
        if not bool(torch.isfinite(latents).all()):
            raise ValueError("encoding the picture gave values that are not finite; try float32")
        return latents.to(self.device)

    def start(
        self,
        images: Float[Tensor, "M 3 H W"],
        numbers: Sequence[int],
        *,
        mask: Bool[Tensor, "1 Hm Wm"] | None = None,
        strength: float | int = 1.0,
        exact_steps: bool = False,
        resample: int = 1,
        seed: int = 0,
        variation: Variation | None = None,
    ) -> Start:
        """What `stream` starts the pictures `numbers` from: images in [-1, 1], one a number or one for all.

        mask: True where to paint anew. Raises ValueError for a mask of another size than the images, a
        strength outside 0..1, resample below 1, and as `encode`.
        """
        cut(1, strength)  # before the work
        if resample < 1:
            raise ValueError(f"resample must be at least 1 (each step once), got {resample}")
        latents = self.encode(images, seed, numbers, variation=variation)
        given = Start(latents, strength, exact_steps, resample=resample)
        if mask is None:
            return given
        if mask.shape[-2:] != images.shape[-2:]:
            sizes = [f"{each.shape[-1]}x{each.shape[-2]}" for each in (mask, images)]
            raise ValueError(f"the mask is {sizes[0]}, the picture {sizes[1]}; they must be of one size")
        if self.inpaints:
            return replace(given, channels=self.mask_channels(images, mask, seed, numbers, variation))
        # A cell is painted anew where any of its pixels is to be: what is white must be able to change.
        cells = F.max_pool2d(mask[None].float(), self.autoencoder.factor) > 0  # (1, 1, h, w)
        return replace(given, mask=cells.expand(len(numbers), -1, -1, -1).to(self.device))

    def mask_channels(
        self,
        images: Float[Tensor, "M 3 H W"],
        mask: Bool[Tensor, "1 H W"],
        seed: int,
        numbers: Sequence[int],
        variation: Variation | None = None,
    ) -> Float[Tensor, "B D h w"]:
        """[mask, latents of the pictures with grey under the mask]: Stable Diffusion's inpainting form."""
        masked = self.encode(images * ~mask, seed, numbers, "masked", variation)
        cells = F.interpolate(mask[None].to(masked), masked.shape[-2:])  # nearest: 0 or 1, as in its training
        return torch.cat([cells.expand(len(numbers), -1, -1, -1), masked], dim=1)  # (B, 1 + C, h, w)

    def blank_channels(
        self, shape: tuple[int, ...], seed: int, numbers: Sequence[int], variation: Variation | None = None
    ) -> Float[Tensor, "B D h w"]:
        """The same where there is no picture: all is to be painted, on latents of `shape`."""
        height, width = (side * self.autoencoder.factor for side in shape[1:])
        everywhere = torch.ones(1, height, width, dtype=torch.bool)
        return self.mask_channels(torch.zeros(1, 3, height, width), everywhere, seed, numbers, variation)

    def stream(
        self,
        prompts: Sequence[str],
        *,
        negative: str = "",
        seed: int = 0,
        first: int = 0,
        steps: int = 50,
        sampler: str = "ddim",
        guidance: float | int = 7.5,
        size: tuple[int, int] | None = None,
        eta: float | int | None = None,
        schedule: str | None = None,
        options: Mapping[str, float | int | str] | None = None,
        variation: Variation | None = None,
        start: Start | None = None,
    ) -> Iterator[Step]:
        """Sample one batch, a picture a prompt, and yield every step.

        start: the pictures to start from, whose size counts then; with strength 0 there is no step to yield.
        `decode(step.sample)` of the last one is the result. What happens between steps (progress, previews of
        `step.denoised`, stopping) is up to the caller. Parameters and errors as in `txt2img`; prompts are
        checked with the first step.
        """
        row, inpaints = find_sampler(sampler), self.inpaints
        whole, taken = (steps, steps) if start is None else start.grid(steps, self.schedule.num_timesteps)
        # A model trained down to pure noise must be started there (Lin et al. 2023, section 3.3).
        usual = "trailing" if self.schedule.config.zero_terminal_snr else row.spacing
        sigmas = make_grid(self.schedule, schedule or usual, whole)[-(taken + 1) :]
        shape = self.latent_shape(size) if start is None else tuple(start.latents.shape[1:])
        images = range(first, first + len(prompts))
        cond = self.conditioning(prompts)
        uncond = cond if guidance == 1 else self.conditioning([negative] * len(prompts))
        if not cond and math.isfinite(guidance):
            guidance = 1  # the two predictions would be the same
        if inpaints:  # without a picture of its own, all is painted anew
            channels = start.channels if start is not None else None
            if channels is None:
                channels = self.blank_channels(shape, seed, images, variation)
            cond, uncond = {**cond, "channels": channels}, {**uncond, "channels": channels}
        network = concatenated(self.unet) if inpaints else self.unet
        denoise = classifier_free(Denoiser(network, self.schedule, self.dtype), cond, uncond, guidance)

        def draw(kind: str, *step: int) -> Tensor:
            return self.draw(kind, shape, seed, images, *step, variation=variation)

        noise, function = draw("image"), row.function
        x = to_sigma_scale(noise, float(sigmas[0]))
        if start is not None:
            if start.strength != 1:  # 1 forgets the picture: exactly what a prompt alone starts from
                x = start.latents + float(sigmas[0]) * noise
            if start.mask is not None:
                denoise = keep_known(denoise, start.latents, noise, start.mask)
            if start.resample > 1:
                function = partial(resampled, row.function, times=start.resample)
        trajectory = function(
            denoise,
            x,
            sigmas,
            noise=lambda *step: draw("step", *step),
            **sampler_options(sampler, eta, options, self.schedule),
        )
        while True:
            with torch.no_grad():  # not around the yield, which would reach into the caller's code
                step = next(trajectory, None)
            if step is None:
                return
            if not bool(torch.isfinite(step.x).all()):
                raise ValueError(
                    f"latents are not finite after step {step.index + 1} of {taken} (sampler {sampler}, "
                    f"guidance {guidance:g}, {self.dtype}); try a lower guidance, or float32"
                )
            if start is not None and start.mask is not None and step.index == taken - 1:
                step = replace(step, sigma=0.0, x=torch.where(start.mask, step.sample, start.latents))
            yield step

    def txt2img(
        self,
        prompts: str | Sequence[str],
        *,
        negative: str = "",
        seed: int = 0,
        first: int = 0,
        steps: int = 50,
        sampler: str = "ddim",
        guidance: float | int = 7.5,
        size: tuple[int, int] | None = None,
        batch: int = 4,
        eta: float | int | None = None,
        schedule: str | None = None,
        options: Mapping[str, float | int | str] | None = None,
        variation: Variation | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Float[Tensor, "N 3 H W"]:
        """A picture a prompt, in their order: float32 in [-1, 1] on the CPU. A prompt n times gives n of it.

        Args:
            negative: prompt to move away from, for all.
            seed, first: picture i draws its noise as number `first + i` of `seed`, whatever `batch` is.
            steps: network evaluations a picture, twice as many unless guidance is 0 or 1.
            guidance: 1 is the prompt as trained, above 1 exaggerates it, 0 ignores and below 0 avoids it.
            size: (W, H) in pixels; None is the size the model was trained on.
            batch: pictures made at once.
            eta: how much noise a sampler that has it adds; None is its own default.
            schedule: name of the noise levels visited, see `grids.GRIDS`; None is the sampler's usual one.
            options: of the sampler, by name, such as {"order": 3}.
            variation: (another seed, how far to go towards its noise): 0 is `seed`, 1 is the other.
            progress: called after each step with (steps done, steps in all), over all batches.

        Raises ValueError for no prompt, a prompt to a model that reads no text, batch below 1, an unknown
        sampler, steps outside 1..T, an illegal size or eta, guidance that is not finite, and latents that
        are not finite after a step.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        how: dict[str, Any] = {
            "negative": negative,
            "seed": seed,
            "first": first,
            "steps": steps,
            "sampler": sampler,
        }
        how |= {"guidance": guidance, "size": size, "eta": eta, "variation": variation}
        how |= {"schedule": schedule, "options": options}
        return self._pictures(prompts, batch, progress, None, **how)

    def img2img(
        self,
        images: Float[Tensor, "... 3 H W"],
        prompts: str | Sequence[str],
        *,
        strength: float | int = 0.6,
        exact_steps: bool = False,
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
        return self._pictures(prompts, batch, progress, (images, options), **how)

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
        made = self._pictures(prompts, batch, progress, (images, options), **how)
        return torch.where(mask, made, images.float().cpu()) if paste else made

    def _pictures(
        self,
        prompts: Sequence[str],
        batch: int,
        progress: Callable[[int, int], None] | None,
        given: tuple[Tensor, dict[str, Any]] | None,
        *,
        seed: int = 0,
        first: int = 0,
        steps: int = 50,
        variation: Variation | None = None,
        **how: Any,
    ) -> Float[Tensor, "N 3 H W"]:
        """All batches; given: images to start from, one or one a prompt, and the options of `start`."""
        parts, made = batches(len(prompts), batch), []
        common: dict[str, Any] = {"seed": seed, "variation": variation}
        for done, part in enumerate(parts):
            start, latents = None, torch.empty(0)
            if given is not None:
                images = given[0] if len(given[0]) == 1 else given[0][part.start : part.stop]
                numbers = range(first + part.start, first + part.stop)
                start = self.start(images, numbers, **given[1], **common)
                latents = start.latents  # the result of strength 0, which takes no step
            taken = steps if start is None else start.steps(steps)
            stream = self.stream(
                prompts[part.start : part.stop],
                first=first + part.start,
                steps=steps,
                start=start,
                **common,
                **how,
            )
            for step in stream:
                latents = step.sample
                if progress is not None:
                    progress(done * taken + step.index + 1, len(parts) * taken)
            made.append(self.decode(latents))
        return torch.cat(made)

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        """Latents to images in [-1, 1], float32 on the CPU.

        Raises ValueError where a value is not finite: never a silent black picture.
        """
        weight = self.autoencoder.post_quant_conv.weight
        images = self.autoencoder.decode_latents(latents.to(weight.device, weight.dtype)).float().cpu()
        if not bool(torch.isfinite(images).all()):
            raise ValueError(f"decoding in {weight.dtype} gave values that are not finite; try float32")
        return images.clamp(-1, 1)


def sampler_options(
    sampler: str,
    eta: float | int | None,
    options: Mapping[str, float | int | str] | None,
    schedule: Schedule,
) -> dict[str, Any]:
    """The options of a sampler beyond the common ones. Raises ValueError for one that it does not have."""
    own = {**(options or {}), **({} if eta is None else {"eta": eta})}
    check_options(sampler, own)
    counts_timesteps = "schedule" in inspect.signature(find_sampler(sampler).function).parameters
    return {**own, "schedule": schedule} if counts_timesteps else own


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
