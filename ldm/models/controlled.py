"""A UNet that follows the hints of ControlNets (controlnet.py), called as the UNet itself is.

    Controlled(unet, [Acting(Control(controlnet, hint), controlnet.encode_hint(hint))])

stands in the UNet's place behind `Denoiser`. Each ControlNet reads the x, t and context that the UNet reads;
the residuals of several are scaled and summed (Multi-ControlNet). Guess mode follows a hint without a prompt:
the unconditional prediction is left alone, so that guidance leads towards the hint, and the finer residuals
are weakened, in one of two ways that are not equal:

    original     scale 0.825^(n - 1 - i) for residual i of n (the ControlNet repository's demos)
    diffusers    scale 10^(i / (n - 1) - 1)
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from ldm.models.blocks import repeat_rows
from ldm.models.controlnet import ControlNet
from ldm.models.unet import add_rows

GUESS_MODES = ("original", "diffusers")


@dataclass(frozen=True, eq=False)
class Control:
    """A ControlNet with what it follows, how strongly and when.

    hint: RGB in [0, 1], one for all pictures or one a picture; whoever samples brings it to their size.
    scale: of the residuals; 0 is without, 1 as trained.
    start, end: the part of the steps in which it acts, 0 to 1. Step i of n is left out where i / n < start or
        (i + 1) / n > end (diffusers' control_guidance_start and _end).
    guess: one of GUESS_MODES, or None.
    """

    controlnet: ControlNet
    hint: Float[Tensor, "N C H W"]
    scale: float | int = 1.0
    start: float | int = 0.0
    end: float | int = 1.0
    guess: str | None = None

    def __post_init__(self) -> None:
        check_influence(self.scale, self.start, self.end, self.guess)
        if not len(self.hint):
            raise ValueError("control needs at least one hint, got none")
        if not 0 <= float(self.hint.min()) <= float(self.hint.max()) <= 1:
            low, high = float(self.hint.min()), float(self.hint.max())
            raise ValueError(f"a control's hint must be between 0 and 1, got {low:g} to {high:g}")

    def acts(self, step: int, steps: int) -> bool:
        """Whether it has a say in step `step`, 0..steps-1."""
        return self.scale != 0 and acts(step, steps, self.start, self.end)

    def scales(self, count: int) -> list[float]:
        """The factor of each of `count` residuals, that of the middle block last."""
        if self.guess is None or self.controlnet.config.global_pool:
            return [float(self.scale)] * count
        if self.guess == "original":
            return [self.scale * 0.825 ** (count - 1 - i) for i in range(count)]
        return [self.scale * 10 ** (i / (count - 1) - 1) for i in range(count)]

    @property
    def spares_unconditional(self) -> bool:
        """Whether the unconditional prediction goes without: in guess mode, and where the residuals are
        means over the picture, whose one effect is then guided like a prompt's (diffusers' choice too)."""
        return self.guess is not None or self.controlnet.config.global_pool


def check_influence(
    scale: float | int = 1.0, start: float | int = 0.0, end: float | int = 1.0, guess: str | None = None
) -> None:
    """Raises ValueError for values outside those of `Control`."""
    if not math.isfinite(scale):
        raise ValueError(f"control scale must be a finite number, got {scale}")
    if not 0 <= start < end <= 1:
        raise ValueError(f"a control acts from 0 <= start < end <= 1 of the steps, got {start} and {end}")
    if guess is not None and guess not in GUESS_MODES:
        raise ValueError(f"guess mode must be one of {', '.join(GUESS_MODES)}, got {guess!r}")


def acts(step: int, steps: int, start: float | int, end: float | int) -> bool:
    """Whether a step is in a control's range, see `Control`."""
    return not (step / steps < start or (step + 1) / steps > end)


class Acting(NamedTuple):
    """A control at work, with its encoded hint: one for all rows of a batch, or one a row."""

    control: Control
    features: Float[Tensor, "B_hint C_hint h w"]


class Controlled:
    """`network` with the residuals of `acting`, none or several, at each call.

    network: the UNet, or what stands for it, with `control` and all else as keywords (`channels` too: a
    ControlNet that does not read those gets the latents alone).
    """

    def __init__(self, network: Callable[..., Tensor], acting: Sequence[Acting]):
        self.network = network
        self.acting = acting

    def __call__(
        self,
        x: Float[Tensor, "B C h w"],
        t: Shaped[Tensor, " B"],
        *,
        controlled: Bool[Tensor, " rows"] | None = None,
        **told: Any,
    ) -> Float[Tensor, "rows C_out h w"]:
        """controlled: which rows of the output are steered by a control that spares the unconditional ones;
        where it is not given, all. told: context, y, channels, as the network takes them."""
        each = [self._residuals(acting, x, t, controlled, told) for acting in self.acting]
        control = [reduce(add_rows, place) for place in zip(*filter(None, each), strict=True)]
        return self.network(x, t, **told, **({"control": control} if control else {}))

    def _residuals(
        self, acting: Acting, x: Tensor, t: Tensor, controlled: Tensor | None, told: dict[str, Any]
    ) -> list[Tensor] | None:
        """Scaled, B or `rows` rows each; None where no row is steered."""
        control, features = acting
        if len(features) > 1:
            features = repeat_rows(features, len(x))
        if control.controlnet.config.unet.in_channels > x.shape[1] and "channels" in told:
            x = torch.cat([x, told["channels"].to(x.dtype)], dim=1)
        inputs = [x, t, told.get("context"), features, told.get("y")]
        rows = controlled if control.spares_unconditional else None
        if rows is None or bool(rows.all()):
            made = control.controlnet(*inputs)
        elif not bool(rows.any()):
            return None
        else:
            # One for all, or fewer x than contexts, stay as they are: `UNet.forward` repeats them
            some = [v if v is None or len(v) != len(rows) else v[rows] for v in inputs]
            made = [spread(residual, rows) for residual in control.controlnet(*some)]
        return [scale * residual for scale, residual in zip(control.scales(len(made)), made, strict=True)]


def spread(
    residual: Float[Tensor, "some *shape"], rows: Bool[Tensor, " rows"]
) -> Float[Tensor, "rows *shape"]:
    """`residual` in the rows that are True, again and again where there are more; zero in the others."""
    whole = residual.new_zeros(len(rows), *residual.shape[1:])
    whole[rows] = repeat_rows(residual, int(rows.sum()))
    return whole
