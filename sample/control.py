"""ControlNets at sampling: from the controls of `settings.Sampling` to what steers the network at a step.

`stream.py` comes here once for each batch, so that a hint is encoded once a picture and not at each step; the
mathematics is in `ldm/models/controlled.py`, the command's side (files, notices, what is recorded) in
`hints.py`. A control acts on every prediction of the model itself, the one with perturbed attention too, but
not on the weaker model of autoguidance: that is another network.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ldm.models.controlled import Acting, Control, Controlled
from ldm.models.deep_cache import DeepCache
from sample.parts import Parts


def check(parts: Parts, controls: Sequence[Control]) -> None:
    """Raises ValueError, in one line, for a ControlNet that cannot steer this model as it is."""
    if controls and isinstance(parts.network, DeepCache):
        raise ValueError("DeepCache leaves out the layers that a ControlNet steers; use one of the two")
    for control in controls:
        config, weight = control.controlnet.config, control.controlnet.conv_in.weight
        config.check_fits(parts.unet.config, parts.autoencoder.factor)
        reads, takes = config.unet.in_channels, parts.unet.config
        if reads not in (takes.in_channels, takes.out_channels):
            raise ValueError(
                f"ControlNet reads {reads} channels of latents, this model's have {takes.out_channels}"
            )
        if control.hint.shape[1] != config.hint_channels:
            raise ValueError(
                f"ControlNet takes a hint of {config.hint_channels} channels, got {control.hint.shape[1]}"
            )
        if (weight.dtype, weight.device.type) != (parts.dtype, parts.device.type):
            raise ValueError(
                f"ControlNet is in {weight.dtype} on {weight.device}, the model in {parts.dtype} on "
                f"{parts.device}; bring them together with controlnet.to(...)"
            )


@dataclass(frozen=True)
class Steering:
    """The controls of a batch, or of some of its rows, hints encoded."""

    all: tuple[Acting, ...] = ()

    @classmethod
    @torch.no_grad()
    def of(cls, parts: Parts, controls: Sequence[Control], shape: tuple[int, ...], count: int) -> "Steering":
        """For `count` pictures with latents of `shape` (C, h, w). A control of scale 0 is left out, so that
        it changes no bit. Raises ValueError as `check`, and for another number of hints than of pictures."""
        check(parts, controls)
        size = (shape[2] * parts.autoencoder.factor, shape[1] * parts.autoencoder.factor)
        found = []
        for control in controls:
            if len(control.hint) not in (1, count):
                raise ValueError(f"{len(control.hint)} hints for {count} pictures; expected one, or one each")
            if control.scale != 0:
                hint = fitted(control.hint, size).to(control.controlnet.conv_in.weight)
                found.append(Acting(control, control.controlnet.encode_hint(hint)))
        return cls(tuple(found))

    def rows(self, rows: Sequence[int]) -> "Steering":
        """The same for some of the pictures."""
        return Steering(
            tuple(
                each if len(each.features) == 1 else each._replace(features=each.features[list(rows)])
                for each in self.all
            )
        )

    @property
    def spares_unconditional(self) -> bool:
        return any(each.control.spares_unconditional for each in self.all)

    def key(self, step: int, steps: int) -> tuple[bool, ...]:
        """Which of them act in a step."""
        return tuple(each.control.acts(step, steps) for each in self.all)

    def around(self, network: Callable[..., Tensor], step: int, steps: int) -> Callable[..., Tensor]:
        """The network as it is in a step; itself where there is no control at all."""
        if not self.all:
            return network
        return Controlled(network, [each for each in self.all if each.control.acts(step, steps)])


UNSTEERED = Steering()


def fitted(hint: Float[Tensor, "N C H W"], size: tuple[int, int]) -> Float[Tensor, "N C H2 W2"]:
    """Hints cut to the shape of `size` (W, H) about their centre and resized to it, bicubically with
    antialiasing, in [0, 1]; themselves where they have that size."""
    width, height = size
    have_height, have_width = hint.shape[2:]
    if (have_width, have_height) == size:
        return hint
    wide = min(have_width, max(1, round(have_height * width / height)))
    high = min(have_height, max(1, round(have_width * height / width)))
    left, top = (have_width - wide) // 2, (have_height - high) // 2
    cut = hint[:, :, top : top + high, left : left + wide].float()
    return F.interpolate(cut, (height, width), mode="bicubic", antialias=True).clamp(0, 1)


def batch_of(controls: Sequence[Control], part: range, count: int) -> list[Control]:
    """The controls of some of `count` pictures. Raises ValueError for another number of hints."""
    found = []
    for control in controls:
        if len(control.hint) not in (1, count):
            raise ValueError(f"{len(control.hint)} hints for {count} pictures; expected one, or one each")
        one = len(control.hint) == 1
        found.append(control if one else replace(control, hint=control.hint[part.start : part.stop]))
    return found
