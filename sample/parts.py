"""The parts of a model, together: from a path to modules, from pictures to latents and back.

`Parts` holds a UNet, an autoencoder, a noise schedule and, where the model reads text, a text tower with its
tokenizer. `Pipeline` (pipeline.py) adds the sampling.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from ldm.config import to_dict
from ldm.device import pick_device
from ldm.diffusion.editing import slerp
from ldm.diffusion.schedule import DiffusionConfig, Schedule
from ldm.models.autoencoder import Autoencoder
from ldm.models.tiling import decode_tiled
from ldm.models.unet import UNet
from ldm.seeding import generator
from ldm.weights.checkpoint import Checkpoint
from ldm.weights.folder import PART_FILES, save_part
from ldm.weights.reading import open_checkpoint
from sample.model import CONTEXTS, ContextEncoder, check_fit, find_model, make_tokenizer, reads_text
from sample.settings import Variation

P = TypeVar("P", bound="Parts")


class Parts:
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
        self.tokenizer: Any = None if text_encoder is None else make_tokenizer(text_encoder, vocabulary)
        self.schedule = Schedule(diffusion)
        self.checkpoint: Checkpoint | None = None
        self.network: Callable[..., Tensor] = self.unet  # what sampling evaluates, see `speed.py`
        self.loras: dict[str, Any] = {}  # see `loras.py`
        self.form: object = None  # the options that gave the network its form
        self.controlnets: dict[Path, Any] = {}  # read to steer it, see `hints.py`

    @classmethod
    def load(
        cls: type[P],
        name_or_path: str | Path = "emoji",
        device: str = "auto",
        dtype: torch.dtype = torch.float32,
        *,
        kind: str | None = None,
        prediction: str | None = None,
        weights: str = "auto",
        vocabulary: str | Path | None = None,
        allow_nan: bool = False,
    ) -> P:
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
        parts_of_model = cls(
            modules["unet"],
            modules["autoencoder"],
            modules.get("context"),
            diffusion,
            device=device,
            vocabulary=Path(vocabulary) if vocabulary else checkpoint.path.parent / "vocab.txt",
        )
        parts_of_model.checkpoint = checkpoint
        return parts_of_model

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

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "B C h w"], tile: int | None = None) -> Float[Tensor, "B 3 H W"]:
        """Latents to images in [-1, 1], float32 on the CPU; in tiles of `tile` cells where that is given.

        Raises ValueError where a value is not finite: never a silent black picture.
        """
        weight = self.autoencoder.post_quant_conv.weight
        latents = latents.to(weight.device, weight.dtype)
        if tile is None:
            images = self.autoencoder.decode_latents(latents)
        else:
            images = decode_tiled(self.autoencoder, latents, tile, tile // 4)
        images = images.float().cpu()
        if not bool(torch.isfinite(images).all()):
            raise ValueError(f"decoding in {weight.dtype} gave values that are not finite; try float32")
        return images.clamp(-1, 1)
