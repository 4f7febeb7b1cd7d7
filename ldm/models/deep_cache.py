"""Reuse of deep features between steps (Ma et al. 2023, DeepCache, arXiv:2312.00858).

From step to step the deep layers of a UNet change little. Every N-th step runs all of it and keeps what
enters the last stages of the way up; the steps between compute only the first and the last layers, with that
feature in between. An approximation; the wrapper stands in the place of the UNet behind `Denoiser`:

    Denoiser(DeepCache(unet, 3), schedule)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from ldm.models.blocks import repeat_rows
from ldm.models.unet import DownBlock, UNet, UpBlock


@dataclass
class Kept:
    """What a full run left behind for one conditioning."""

    conditioning: tuple[Tensor | None, Tensor | None]  # held, so that its identity stays its own
    feature: Tensor  # what enters the first stage that the steps between compute
    made: int  # number of the step of the full run
    start: float  # timestep at which the trajectory began
    level: float  # timestep of the last run, full or not


class DeepCache:
    """`unet` with the deep features of every `every`-th step; called as the UNet is.

    A step is a timestep that differs from the call before. Each conditioning (the context and class tensors
    themselves, not their values) has a trajectory and a feature of its own, so that prompts evaluated one
    after the other are never mixed; whoever makes the tensors anew at each step gets full runs. Of one
    conditioning a rising timestep, or the first one again, begins a new trajectory with a full run: samplers
    that go back up gain less.

    Args:
        every: 1 runs all of the network each time, with the same bits as `unet`.
        branch: how many stages (residual block and attention) of the first level run in between on the way
            down; on the way up one more. 0 is the fastest.

    Raises ValueError for every below 1 or a branch outside 0..num_res_blocks.
    """

    def __init__(self, unet: UNet, every: int, branch: int = 0):
        if every < 1:
            raise ValueError(f"DeepCache runs the whole network every N-th step, N at least 1, got {every}")
        stages = unet.config.num_res_blocks
        if not 0 <= branch <= stages:
            raise ValueError(f"DeepCache branch must be between 0 and num_res_blocks {stages}, got {branch}")
        self.unet = unet
        self.every = every
        self.branch = branch
        self.reset()

    def reset(self) -> None:
        """Forget everything: the next call runs the whole network."""
        self.step = 0
        self.level: float | None = None
        self.kept: dict[tuple[object, ...], Kept] = {}

    def __call__(
        self,
        x: Float[Tensor, "B C h w"],
        t: Shaped[Tensor, " B"],
        context: Float[Tensor, "BR T D"] | None = None,
        y: Shaped[Tensor, "B2 ..."] | None = None,
        control: Sequence[Tensor] | None = None,
    ) -> Float[Tensor, "BR2 C_out h w"]:
        """As `UNet.forward`; ValueError besides for `control`, which steers the deep layers at each step."""
        if control is not None:
            raise ValueError("DeepCache leaves out the layers that a ControlNet steers; use one of the two")
        level = float(t.max())
        if level != self.level:
            self.step, self.level = self.step + 1, level
            self.kept = {key: kept for key, kept in self.kept.items() if self.step - kept.made <= self.every}
        key = (id(context), id(y), x.shape)
        kept = self.kept.get(key)
        if kept is not None and (level > kept.level or level == kept.start):
            kept = None  # of the trajectory before
        if kept is not None and self.step - kept.made < self.every:
            kept.level = level
            return self._between(kept.feature, x, t, context, y)
        output, feature = self._full(x, t, context, y)
        if self.every > 1:
            start = level if kept is None else kept.start
            self.kept[key] = Kept((context, y), feature, self.step, start, level)
        return output

    def _full(self, x: Tensor, t: Tensor, context: Tensor | None, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """The whole network, and the feature without the skip that is concatenated to it."""
        features = []

        def keep(resnet: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            features.append(inputs[0][:, : -self.unet.config.skip_channels[self.branch]].clone())

        last = self.unet.up_blocks[-1]
        assert isinstance(last, UpBlock)
        handle = last.resnets[-1 - self.branch].register_forward_pre_hook(keep)
        try:
            output = self.unet(x, t, context, y)
        finally:
            handle.remove()
        return output, features[0]

    def _between(
        self,
        feature: Float[Tensor, "BR C_last h w"],
        x: Float[Tensor, "B C h w"],
        t: Shaped[Tensor, " B"],
        context: Float[Tensor, "BR T D"] | None,
        y: Shaped[Tensor, "B2 ..."] | None,
    ) -> Float[Tensor, "BR C_out h w"]:
        unet, stages = self.unet, self.branch
        t = repeat_rows(t, len(feature))  # where x has several contexts, see `UNet.forward`
        if unet.config.pooled_context and context is not None:
            y = context[:, -1]
        emb = unet.embed(t, None if y is None else repeat_rows(y, len(feature)))
        h = repeat_rows(unet.conv_in(x), len(feature))
        skips = [h]
        first, last = unet.down_blocks[0], unet.up_blocks[-1]
        assert isinstance(first, DownBlock)
        assert isinstance(last, UpBlock)
        for i in range(stages):
            h = first.resnets[i](h, emb)
            if first.attentions:
                h = first.attentions[i](h, context)
            skips.append(h)
        h = feature
        for i in range(len(last.resnets) - 1 - stages, len(last.resnets)):
            h = last.resnets[i](torch.cat([h, skips.pop()], dim=1), emb)
            if last.attentions:
                h = last.attentions[i](h, context)
        return unet.conv_out(F.silu(unet.norm_out(h)))
