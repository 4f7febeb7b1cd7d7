"""The speed options of the commands: a model in another form, made before sampling.

`--fast-conv` and `--compile` compute the same but for rounding, `--token-merging` and `--deep-cache`
something near. Each gives `pipe.network`, what sampling evaluates; the weights stay shared with `pipe.unet`.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ldm.models.compiled import compile_blocks
from ldm.models.controlled import Control
from ldm.models.deep_cache import DeepCache
from ldm.models.fast_conv import fast_convolutions, kernel_bytes
from ldm.models.token_merging import merging
from ldm.models.unet import UNetConfig
from ldm.models.variants import sharing
from sample.control import check
from sample.model import reads_text
from sample.parts import Parts

OPTIONS = ("fast_conv", "compile", "deep_cache", "token_merging")


def speed_up(pipe: Parts, args: argparse.Namespace, size: tuple[int, int]) -> None:
    """Set `pipe.network` as the options say, for pictures of `size` (W, H); nothing where that is done.

    Raises ValueError for values outside their range.
    """
    wanted = (*(getattr(args, name) for name in OPTIONS), size, args.batch)
    if pipe.form == wanted:
        return
    unet = pipe.unet
    if args.fast_conv:
        if not (pipe.device.type == "cpu" and pipe.dtype == torch.float32):
            raise ValueError(f"--fast-conv is for float32 on the CPU, got {pipe.dtype} on {pipe.device}")
        x, t, context, y = _inputs(pipe, pipe.unet.config, args, size)
        unet, found = fast_convolutions(unet, args.fast_conv, x, t, context, y)
        print(f"UNet: {found}", file=sys.stderr)
        left = args.fast_conv - found.bytes / 1e9
        z = torch.zeros(len(x), pipe.autoencoder.config.z_channels, *x.shape[2:])
        decoder, found = fast_convolutions(pipe.autoencoder.decoder, left, z)
        print(f"decoder: {found}", file=sys.stderr)
        pipe.autoencoder = sharing(pipe.autoencoder)
        pipe.autoencoder.decoder = decoder
    if args.token_merging:  # behind fast convolutions, whose pass without data cannot choose tokens
        unet = merging(unet, args.token_merging)
    if args.compile:
        unet = compile_blocks(unet)
    pipe.network = unet if args.deep_cache is None else DeepCache(unet, *cache_of(args.deep_cache))
    pipe.form = wanted


def speed_up_controls(
    pipe: Parts, controls: Sequence[Control], args: argparse.Namespace, size: tuple[int, int]
) -> list[Control]:
    """The same controls, their ControlNets in the form that `speed_up` gave the UNet: compiled, with fast
    convolutions in what memory those of UNet and decoder leave. Raises ValueError as `control.check`."""
    check(pipe, controls)
    left = args.fast_conv
    if left and controls:
        assert isinstance(pipe.network, nn.Module), "checked above"
        left -= (kernel_bytes(pipe.network) + kernel_bytes(pipe.autoencoder.decoder)) / 1e9
    found = []
    for control in controls:
        net = control.controlnet
        if args.fast_conv:
            x, t, context, y = _inputs(pipe, net.config.unet, args, size)
            features = torch.zeros(1, net.config.unet.model_channels, *x.shape[2:])
            net, fast = fast_convolutions(net, max(left, 0.0), x, t, context, features, y)
            print(f"ControlNet: {fast}", file=sys.stderr)
            left -= fast.bytes / 1e9
        found.append(replace(control, controlnet=compile_blocks(net) if args.compile else net))
    return found


def _inputs(
    pipe: Parts, config: UNetConfig, args: argparse.Namespace, size: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """x, t, context and y of the shapes that a network sees in a batch."""
    batch = min(args.batch, args.n)
    x = torch.zeros(batch, config.in_channels, *pipe.latent_shape(size)[1:])
    tokens = getattr(pipe.tokenizer, "context_length", 1)
    width = config.context_dim if reads_text(config) else None
    context = None if width is None else torch.zeros(2 * batch, tokens, width)
    y = None if config.num_classes is None else torch.zeros(batch, dtype=torch.long)
    return x, torch.zeros(batch), context, y


def cache_of(text: str) -> tuple[int, int]:
    """`N` or `N:BRANCH` as two numbers. Raises ValueError for other text."""
    every, _, branch = text.partition(":")
    if not (every.isdecimal() and (branch or "0").isdecimal()):
        raise ValueError(f"--deep-cache must be like 3 or 3:1, got {text!r}")
    return int(every), int(branch or 0)
