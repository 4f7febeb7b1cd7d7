"""Tensors to pictures and back: PNG files with their parameters in a text chunk, grids, and reading any
picture."""

import io
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor

from ldm.diffusion.names import GRID_NAMES, SAMPLER_NAMES, GridName, SamplerName

T = TypeVar("T")

# --- tensors and pictures -----------------------------------------------------------------------------------


def to_pil(images: Float[Tensor, "B C H W"]) -> list[Image.Image]:
    """RGB pictures of images in [-1, 1] (clamped).

    Raises ValueError where a value is not finite: never a silent black picture.
    """
    bad = [i for i, image in enumerate(images) if not bool(torch.isfinite(image).all())]
    if bad:
        raise ValueError(
            f"picture {bad[0]} of {len(images)} holds NaN or infinite values; try --dtype float32"
        )
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [
        Image.fromarray(np.ascontiguousarray(row))
        for row in rearrange(pixels, "b c h w -> b h w c").cpu().numpy()
    ]


def to_tensor(picture: Image.Image) -> Float[Tensor, "3 H W"]:
    """An RGB picture as float32 in [-1, 1]; the inverse of `to_pil`."""
    return rearrange(torch.from_numpy(np.array(picture)).float() / 127.5 - 1, "h w c -> c h w")


def grid(pictures: list[Image.Image], columns: int | None = None, gap: int = 2) -> Image.Image:
    """Pictures of one size side by side on white, nearly square unless `columns` is given."""
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    width, height = pictures[0].size
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (gap + i % columns * (width + gap), gap + i // columns * (height + gap)))
    return sheet


# --- writing ------------------------------------------------------------------------------------------------


def save_png(picture: Image.Image, path: Path, parameters: dict[str, Any] | None = None) -> None:
    """Write a PNG atomically, over an older one; `parameters` go into the text chunk `ldm` as JSON.

    Where they name a prompt, the chunk `parameters` tells the same as the web UIs write it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    info = PngImagePlugin.PngInfo()
    if parameters is not None:
        info.add_itxt("ldm", json.dumps(parameters, ensure_ascii=False))
        if "prompt" in parameters:
            info.add_itxt("parameters", web_ui_text(parameters))
    try:
        picture.save(temporary, format="PNG", pnginfo=info)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_new(
    picture: Image.Image, folder: Path, prefix: str, digits: int, parameters: dict[str, Any] | None = None
) -> Path:
    """Write `folder/{prefix}{number}.png` under the first number above all that are there; returns its path.

    Never replaces a file, not even one of a command that writes to the same folder at the same time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.png")
    taken = [int(match[1]) for name in os.listdir(folder) if (match := pattern.fullmatch(name))]
    number = max(taken, default=-1) + 1
    while True:
        path = folder / f"{prefix}{number:0{digits}d}.png"
        try:
            with open(path, "xb"):  # claims the name, or fails where it exists
                break
        except FileExistsError:
            number += 1
    try:
        save_png(picture, path, parameters)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path


def read_parameters(path: Path) -> dict[str, Any]:
    """The parameters that `save_png` wrote. Raises ValueError or FileNotFoundError where there are none."""
    try:
        with Image.open(path) as picture:
            text = getattr(picture, "text", {}).get("ldm")
    except FileNotFoundError:
        raise
    except (ValueError, SyntaxError, OSError) as error:  # damaged, no PNG, text beyond Pillow's limit
        raise ValueError(f"{path}: unreadable image ({' '.join(str(error).split()):.100})") from None
    if text is None:
        raise ValueError(f"{path} carries no parameters of ours (PNG text chunk 'ldm')")
    try:
        parameters = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: its text chunk 'ldm' is not JSON") from None
    if not isinstance(parameters, dict):
        raise ValueError(f"{path}: its text chunk 'ldm' holds no parameters")
    return parameters


WEB_UI_FIELDS = {
    "steps": "Steps", "sampler": "Sampler", "schedule": "Schedule type", "guidance": "CFG scale",
    "seed": "Seed", "size": "Size", "weights": "Model hash", "model": "Model", "eta": "Eta",
    "variation_seed": "Variation seed", "variation_strength": "Variation seed strength",
    "strength": "Denoising strength", "image": "Image number", "versions": "Version",
}  # fmt: skip


def web_ui_text(parameters: dict[str, Any]) -> str:
    """Parameters in the form of AUTOMATIC1111's web UI: the prompt, the negative one, a line of settings.

    Its names where it has them. Its picture i of a call has seed + i, ours the seed and a number ("Image
    number"); the noise differs, so these settings remake a picture here and only resemble it there.
    """
    fields = []
    for name, title in WEB_UI_FIELDS.items():
        value = parameters.get(name)
        if value is None or value == "":
            continue
        match name, value:
            case "sampler", str():
                value = web_ui_name(SAMPLER_NAMES, value, parameters.get("sampler_option"))
            case "schedule", str():
                value = web_ui_name(GRID_NAMES, value)
            case "size", list() | tuple():
                value = "x".join(map(str, value))
            case "versions", dict():
                value = f"ldm {value.get('latent-diffusion-from-scratch', 'unknown')}"
        value = f"{value:.10g}" if isinstance(value, float) else str(value)
        if any(sign in value for sign in ",:\n"):  # quoted, as there: its readers would take the value apart
            value = json.dumps(value, ensure_ascii=False)
        fields.append(f"{title}: {value}")
    lines = [str(parameters.get("prompt", ""))]
    if parameters.get("negative"):
        lines.append(f"Negative prompt: {parameters['negative']}")
    return "\n".join([*lines, ", ".join(fields)])


def web_ui_name(rows: Sequence[SamplerName | GridName], ours: str, options: Any = None) -> str:
    """What the web UI calls our sampler with these options, or our schedule; ours where it has no such."""
    for row in rows:
        own = [f"{name}={value}" for name, value in getattr(row, "options", {}).items()]
        if row[0] == ours and own == (options or []) and row.a1111:
            return row.a1111
    return ours


def save_grid(images: Float[Tensor, "B C H W"], path: Path, columns: int | None = None) -> None:
    save_png(grid(to_pil(images), columns), path)


def output_folder(path: str | Path) -> Path:
    """`path` as a folder to write to, not made yet. Raises ValueError or PermissionError, before any work
    is done."""
    folder = Path(path).expanduser()
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise ValueError(f"{existing} is a file; expected a folder to write to")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"{existing}: this folder cannot be written to")
    return folder


# --- reading ------------------------------------------------------------------------------------------------


def read_rgb(path: Path, square: int | None = None, content: bytes | None = None) -> Image.Image:
    """Any picture file as 8-bit RGB, upright, transparency on white; of an animation the first frame.

    square: cut to the centre square and resize it to this side (Lanczos). content: the bytes of the picture
    where they are no file of their own; `path` only names them then. Raises ValueError, with the file's name
    and what is wrong with it.
    """
    return decoded(path, to_rgb if square is None else partial(square_rgb, size=square), content=content)


def decoded(
    path: Path, convert: Callable[[Image.Image], T], what: str = "image", content: bytes | None = None
) -> T:
    """What `convert` makes of the upright picture in a file. Raises ValueError as `read_rgb`."""
    if content is None and not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with warnings.catch_warnings():
            # Pillow only warns between one and two times its limit; nothing may be decoded above the limit.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path if content is None else io.BytesIO(content)) as image:
                return convert(ImageOps.exif_transpose(image))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise ValueError(f"{path}: more than {Image.MAX_IMAGE_PIXELS} pixels") from None
    except Image.UnidentifiedImageError:
        raise ValueError(f"{path}: not an image") from None
    except Exception as error:  # decoders of damaged files raise whatever they stumble over
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: unreadable {what} ({reason:.140})") from None


def read_mask(path: Path, size: tuple[int, int]) -> Image.Image:
    """A mask as black and white pixels ("L", 0 or 255) of `size` (W, H): white is where to paint anew.

    Any picture will do: grey above the middle counts as white, and so do transparent pixels. A mask of
    another size is resized, which is told on stderr. Raises ValueError as `read_rgb`.
    """
    grey = read_rgb(path).convert("L")
    if grey.size != size:
        print(
            f"ldm-sample: warning: {path}: mask resized from {grey.width}x{grey.height} to the picture's "
            f"{size[0]}x{size[1]}",
            file=sys.stderr,
        )
        grey = grey.resize(size, Image.Resampling.BILINEAR)
    return grey.point(lambda value: 255 if value > 127 else 0)


def cover(
    picture: Image.Image, size: tuple[int, int], resample: Image.Resampling = Image.Resampling.LANCZOS
) -> Image.Image:
    """`picture` scaled until it covers `size` (W, H) and cut to its centre: nothing is stretched."""
    return picture if picture.size == size else ImageOps.fit(picture, size, resample)


def square_rgb(image: Image.Image, size: int) -> Image.Image:
    """The centre square of a Pillow image as RGB of `size` x `size`."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    # The square first: a strip of 1 x 50000 pixels must not become one of 64 x 3200000.
    square = to_rgb(image.crop((left, top, left + side, top + side)))
    return square if side == size else square.resize((size, size), Image.Resampling.LANCZOS)


def to_rgb(image: Image.Image, ground: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """Any Pillow image as 8-bit RGB: transparency on `ground`, white, 16 bit scaled to 8.

    Raises ValueError for floating-point and 32-bit pixels.
    """
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range; save it with 8 or 16 bit")
    if image.mode.startswith("I"):  # 16-bit grey ("I;16", "I;16B", ...), in 32-bit form ("I") for some files
        grey = np.asarray(image).astype(np.int64)
        if grey.size and (grey.min() < 0 or grey.max() > 65535):
            raise ValueError("32-bit pixels have no fixed range; save it with 8 or 16 bit")
        image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*ground, 255)), image.convert("RGBA"))
    return image.convert("RGB")
