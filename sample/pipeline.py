"""A model's parts together: prompts to pictures (Rombach et al. 2022, arXiv:2112.10752, figure 3).

`Pipeline` holds a UNet, an autoencoder, a noise schedule and, where the model reads text, a text tower with
its tokenizer. In the walk it is the one file between a command and the sampler: `stream` turns prompts into
conditioning and noise, hands both to a sampler of `ldm/diffusion/samplers.py` and yields what that yields;
`decode` makes pictures of the last step's latents.
"""

import difflib
import inspect
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ldm.config import to_dict
from ldm.device import pick_device
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import classifier_free
from ldm.diffusion.process import to_sigma_scale
from ldm.diffusion.samplers import Step, find_sampler
from ldm.diffusion.schedule import DiffusionConfig, Schedule, sigma_grid
from ldm.models.autoencoder import Autoencoder, AutoencoderConfig
from ldm.models.bert import BertTextEncoder
from ldm.models.class_embedder import ClassEmbedder, ClassTokenizer
from ldm.models.clip import TextEncoder
from ldm.models.tokenizer import Tokenizer
from ldm.models.unet import UNet, UNetConfig
from ldm.models.wordpiece import WordPieceTokenizer
from ldm.seeding import generator
from ldm.weights.checkpoint import Checkpoint
from ldm.weights.folder import PART_FILES, UNET, save_part
from ldm.weights.reading import open_checkpoint

SHIPPED = Path(__file__).parent / "models"
ContextEncoder = TextEncoder | BertTextEncoder | ClassEmbedder
CONTEXTS = ("text", "bert", "classes")  # parts of a checkpoint that a context comes from


EXTRA_CHANNELS = {5: "mask and masked picture: it is for inpainting", 1: "depth"}


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
        unit = factor * self.unet.config.factor
        if any(side < unit or side % unit for side in size):
            nearest = "x".join(str(max(unit, round(side / unit) * unit)) for side in size)
            raise ValueError(
                f"size {size[0]}x{size[1]}: sides must be multiples of {unit}; the nearest is {nearest}"
            )
        return channels, size[1] // factor, size[0] // factor

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

    def _require_plain(self) -> None:
        """Raises ValueError where the UNet reads more than latents and a context."""
        more = self.unet.config.in_channels - self.unet.config.out_channels
        if more:
            raise ValueError(
                f"this UNet reads {more} channels besides the latents, which a prompt alone does not give: "
                f"{EXTRA_CHANNELS.get(more, 'of a picture')}"
            )

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
    ) -> Iterator[Step]:
        """Sample one batch, a picture a prompt, and yield every step.

        `decode(step.sample)` of the last one is the result. What happens between steps (progress, previews of
        `step.denoised`, stopping) is up to the caller. Parameters and errors as in `txt2img`; prompts are
        checked with the first step.
        """
        self._require_plain()
        row = find_sampler(sampler)
        # A model trained down to pure noise must be started there (Lin et al. 2023, section 3.3).
        spacing = "trailing" if self.schedule.config.zero_terminal_snr else row.spacing
        sigmas = sigma_grid(self.schedule, spacing, steps)
        shape = self.latent_shape(size)
        images = range(first, first + len(prompts))
        cond = self.conditioning(prompts)
        uncond = cond if guidance == 1 else self.conditioning([negative] * len(prompts))
        if not cond and math.isfinite(guidance):
            guidance = 1  # the two predictions would be the same
        trajectory = row.function(
            classifier_free(Denoiser(self.unet, self.schedule, self.dtype), cond, uncond, guidance),
            to_sigma_scale(self.noise(shape, *[(seed, "image", i) for i in images]), float(sigmas[0])),
            sigmas,
            noise=lambda step: self.noise(shape, *[(seed, "step", i, step) for i in images]),
            **sampler_options(sampler, eta),
        )
        while True:
            with torch.no_grad():  # not around the yield, which would reach into the caller's code
                step = next(trajectory, None)
            if step is None:
                return
            if not bool(torch.isfinite(step.x).all()):
                raise ValueError(
                    f"latents are not finite after step {step.index + 1} of {steps} (sampler {sampler}, "
                    f"guidance {guidance:g}, {self.dtype}); try a lower guidance, or float32"
                )
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
            progress: called after each step with (steps done, steps in all), over all batches.

        Raises ValueError for no prompt, a prompt to a model that reads no text, batch below 1, an unknown
        sampler, steps outside 1..T, an illegal size or eta, guidance that is not finite, and latents that
        are not finite after a step.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        parts = batches(len(prompts), batch)
        images = []
        for done, part in enumerate(parts):
            stream = self.stream(
                prompts[part.start : part.stop],
                negative=negative,
                seed=seed,
                first=first + part.start,
                steps=steps,
                sampler=sampler,
                guidance=guidance,
                size=size,
                eta=eta,
            )
            for step in stream:
                if progress is not None:
                    progress(done * steps + step.index + 1, len(parts) * steps)
            images.append(self.decode(step.sample))
        return torch.cat(images)

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


def make_tokenizer(encoder: ContextEncoder, vocabulary: Path | None) -> Any:
    """What turns prompts into the ids that `encoder` reads."""
    if isinstance(encoder, ClassEmbedder):
        return ClassTokenizer(encoder.config)
    if isinstance(encoder, TextEncoder):
        return Tokenizer(encoder.config.context_length, encoder.config.padding)
    return WordPieceTokenizer(vocabulary or Path("vocab.txt"), encoder.config.context_length)


def reads_text(config: UNetConfig | None) -> bool:
    """Whether the UNet attends to a text: the ADM form has no cross-attention."""
    return config is not None and config.context_dim is not None and config.attention == "transformer"


def check_fit(unet: UNetConfig, autoencoder: AutoencoderConfig, width: int | None) -> None:
    """Raises ValueError where the parts are of different models; `width` is that of the context, if any."""
    wanted = unet.context_dim if reads_text(unet) else None
    if wanted != width:
        raise ValueError(f"the UNet reads a context of width {wanted}, the text encoder gives {width}")
    if not unet.in_channels >= unet.out_channels == autoencoder.latent_channels:
        raise ValueError(
            f"the UNet takes {unet.in_channels} channels and gives {unet.out_channels}, the autoencoder has "
            f"{autoencoder.latent_channels}; the last two must be equal, and the first no less"
        )


def find_model(name_or_path: str | Path) -> Path:
    """The folder of a shipped name, or the path itself.

    A shipped name wins over a folder of that name in the working folder, which is `./name`. Raises
    FileNotFoundError, which lists the shipped names.
    """
    shipped = sorted(path.parent.name for path in SHIPPED.glob(f"*/{UNET}"))
    if str(name_or_path) in shipped:
        return SHIPPED / str(name_or_path)
    path = Path(name_or_path).expanduser()
    if not os.path.lexists(path):
        near = difflib.get_close_matches(str(name_or_path), shipped, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        names = ", ".join(shipped) or "none"
        raise FileNotFoundError(
            f"model {str(name_or_path)!r} is no shipped name, no file and no folder; {hint}shipped: {names}"
        )
    return path


def sampler_options(sampler: str, eta: float | int | None) -> dict[str, float | int]:
    """The options of a sampler beyond the common ones. Raises ValueError for an eta that it does not have."""
    if eta is None:
        return {}
    if "eta" not in inspect.signature(find_sampler(sampler).function).parameters:
        raise ValueError(f"sampler {sampler} has no eta")
    return {"eta": eta}


def batches(count: int, batch: int) -> list[range]:
    """0..count-1 in runs of `batch`, the last maybe shorter. Raises ValueError where either is below 1."""
    if count < 1 or batch < 1:
        raise ValueError(
            f"at least one picture and a batch of at least 1 are needed, got {count} and {batch}"
        )
    return [range(start, min(start + batch, count)) for start in range(0, count, batch)]
