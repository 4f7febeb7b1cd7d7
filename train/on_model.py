"""What the tasks share that teach a given model: ControlNet, LoRA, DreamBooth, textual inversion.

The model, shipped, of a run, or anybody's Stable Diffusion, is read once and frozen; a task then trains what
it adds. Captions are read by the model's own tower, once for the set where nothing of it is trained.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from ldm.models.clip import TextEncoder
from ldm.weights.folder import weights_hash
from sample.pipeline import Pipeline
from train.conditioning import FrozenText
from train.denoising import DenoisingConfig, DenoisingTask


@runtime_checkable
class OnModelConfig(DenoisingConfig, Protocol):
    """model: shipped name, file or folder, as `ldm-sample --model` takes it."""

    @property
    def model(self) -> str: ...


class OnModelTask(DenoisingTask):
    """A task on a model: `base` is that, frozen, in float32 and evaluation mode."""

    config: OnModelConfig

    def __init__(self, config: OnModelConfig):
        self.base = Pipeline.load(config.model, device=config.run.device)
        for part in (self.base.unet, self.base.autoencoder, self.base.text_encoder):
            if part is not None:
                part.requires_grad_(False).eval()
        self.base.latent_shape((config.data.size, config.data.size))  # refuses an illegal size
        super().__init__(config, self.base.autoencoder, self.base.schedule)
        self.unet, self.text_encoder = self.base.unet, self.base.text_encoder
        self.network = self.trained = self.unet
        self.read = self.base.tokenizer
        assert self.base.checkpoint is not None
        self.model_hash = weights_hash(self.base.checkpoint.files)
        self.given = {"model": self.model_hash}

    def read_once(self, captions: Sequence[str], cache: bool = True) -> None:
        """Read captions by the frozen tower once and keep what it makes of them, on disk by `cache`."""
        if isinstance(self.base.text_encoder, TextEncoder):
            folder = Path(self.config.run.out) / "cache" if cache else None
            self.read = self.frozen_text = FrozenText(self.base.text_encoder, captions, folder)

    def pipeline(self) -> Pipeline:
        return self.base
