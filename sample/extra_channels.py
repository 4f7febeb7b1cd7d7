"""What a UNet reads beside its noised latents, told by how many channels more than latents it takes.

Each of these models was trained with something concatenated to its input (Rombach et al. 2022, section 3.3);
`ldm/diffusion/editing.py` makes the channels. Called where a command must know what it has to be given.
"""

from dataclasses import dataclass

from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.unet import UNetConfig
from sample.model import reads_text


@dataclass(frozen=True)
class Extra:
    """One thing read besides. channels: how many, of latents with C; text: whether it reads a text, too;
    level: whether it is told a noise level, by a table."""

    name: str
    what: str  # for messages
    command: str  # what gives it to the model
    text: bool
    fixed: int = 0
    latents: int = 0  # this many times C
    level: bool = False

    def channels(self, latent_channels: int) -> int:
        return self.fixed + self.latents * latent_channels


EXTRAS = {
    extra.name: extra
    for extra in (
        Extra("inpainting", "a mask and the masked picture", "inpaint", text=True, fixed=1, latents=1),
        Extra("ldm_inpainting", "the masked picture and a mask", "inpaint", text=False, fixed=1, latents=1),
        Extra("depth", "a depth picture", "img2img --depth", text=True, fixed=1),
        Extra("instruct", "the picture to edit", "instruct", text=True, latents=1),
        Extra("superresolution", "a small picture", "upscale", text=False, fixed=3),
        Extra("upscaler", "a small picture with noise", "upscale", text=True, fixed=3, level=True),
    )
}


def extra_of(unet: UNetConfig, autoencoder: AutoencoderConfig) -> str | None:
    """The name in `EXTRAS` of what the UNet reads beside its latents; None where that is nothing.

    Raises ValueError for a number of channels that none of them has.
    """
    more, text = unet.in_channels - unet.out_channels, reads_text(unet)
    if not more:
        return None
    for extra in EXTRAS.values():
        level = unet.num_classes is not None
        if (extra.text, extra.level, extra.channels(autoencoder.latent_channels)) == (text, level, more):
            return extra.name
    known = ", ".join(
        f"{extra.channels(autoencoder.latent_channels)} for {extra.what}"
        for extra in EXTRAS.values()
        if extra.text == text
    )
    raise ValueError(
        f"this UNet reads {more} channels besides its {unet.out_channels} of latents, which no command gives "
        f"it; known of models that read {'a' if text else 'no'} text: {known}"
    )
