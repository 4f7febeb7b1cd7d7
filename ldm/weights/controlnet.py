"""A ControlNet from a file or folder of whoever wrote it, and the same control for another base model.

    ours        `controlnet.safetensors`, alone or in a folder; its header holds the configuration
    original    `control_model.*`, beside a whole Stable Diffusion or pruned, with or without that prefix
    diffusers   a `ControlNetModel`: config.json beside its weights, or a pipeline with a `controlnet` folder

Reading is that of every checkpoint (`reading.py`); `load_controlnet` is for callers who want this part alone.
`transfer` is the original's trick (`tool_transfer_control.py`): what a ControlNet learnt is taken for its
difference to the base it was copied from, and added to another base of the same shape.

    control_new = base_new + (control - base)       where copied; zero convolutions and hint encoder stay
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Size, Tensor

from ldm.models.controlnet import ControlNet, ControlNetConfig
from ldm.models.unet import UNetConfig
from ldm.weights.checkpoint import Checkpoint, Part
from ldm.weights.kinds import ModelConfig
from ldm.weights.names import shapes
from ldm.weights.reading import open_checkpoint


def load_controlnet(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    kind: str | None = None,
    allow_nan: bool = False,
) -> ControlNet:
    """The ControlNet that a file or folder holds, in evaluation mode on `device`; its `config` says what it
    is for (`ControlNetConfig.check_fits`).

    kind: name or YAML file of a kind, for a single file that is not recognised. Raises FileNotFoundError, or
    ValueError in one line for what holds no ControlNet, is damaged, does not fit or overflows `dtype`.
    """
    part = open_checkpoint(path, kind=kind).require("control")
    controlnet: ControlNet = part.load(dtype, allow_nan)
    return controlnet.to(device)


def transfer(control: Checkpoint, base: Checkpoint, other: Checkpoint) -> Checkpoint:
    """The ControlNet of `control`, which was trained on `base`, as one for `other`; computed when it is read.

    Raises ValueError, naming what differs, where one of the two UNets is none that this ControlNet fits.
    """
    part, old, new = control.require("control"), base.require("unet"), other.require("unet")
    assert isinstance(part.config, ControlNetConfig)
    for unet, source in ((old, base), (new, other)):
        assert isinstance(unet.config, UNetConfig)
        if wrong := mismatches(part.config, unet.config):
            raise ValueError(
                f"{control.path} is no ControlNet for the UNet of {source.path}: {', '.join(wrong[:5])}"
            )
    moved = Transferred(part.config, part.source, part.names, part.to_ours, old, new)
    return replace(
        control, config=ModelConfig(control=part.config), parts={"control": moved}, foreign={}, notes=()
    )


@dataclass(frozen=True)
class Transferred(Part):
    """A ControlNet whose copied tensors are moved by what parts `new` from `old`, two UNets."""

    old: Part
    new: Part

    def tensors(self, dtype: torch.dtype | None = None, allow_nan: bool = False) -> dict[str, Tensor]:
        """As of every part; computed in float32, then in `dtype` or that of the file."""
        control = super().tensors(None, allow_nan)
        old, new = self.old.tensors(None, allow_nan), self.new.tensors(None, allow_nan)
        moved = {name: t.to(dtype or t.dtype) for name, t in control.items() if name not in old}
        for name in control.keys() & old.keys():
            before, out, into = control[name], old[name], new[name]
            if name == "conv_in.weight":  # an inpainting UNet reads more behind the latents
                out, into = out[:, : before.shape[1]], into[:, : before.shape[1]]
            learnt = before.float() - out.float()  # nothing at the start of training, and then exactly
            after = (into.float() + learnt).to(dtype or before.dtype)
            if not (allow_nan or bool(torch.isfinite(after).all())):
                raise ValueError(
                    f"{name} is not finite as {after.dtype} on its new base; try --dtype float32"
                )
            moved[name] = after
        return {name: moved[name] for name in control}


def mismatches(control: ControlNetConfig, unet: UNetConfig) -> list[str]:
    """In what `unet` is none that a ControlNet like this can be a copy of; empty where it is."""
    if different := control.differences(unet):
        return different
    heads = dict.fromkeys((control.unet.heads(width), unet.heads(width)) for width in unet.widths)
    different = [f"{a} heads (the UNet's {b})" for a, b in heads if a != b]
    base = shapes(unet)
    added = ("hint_encoder.", "zero_convs.")
    for name, shape in shapes(control).items():
        if name.startswith(added):
            continue
        found = base.get(name)
        if name == "conv_in.weight" and found is not None and found[1] > shape[1]:
            found = Size((found[0], shape[1], *found[2:]))
        if found != shape:
            different.append(f"{name} {list(shape)} (the UNet's {None if found is None else list(found)})")
    return different
