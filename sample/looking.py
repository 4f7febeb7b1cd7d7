"""Looking inside while pictures are made: previews, the estimate at every step, attention to the words.

One `Look` a batch; `txt2img.py` shows it every step and lets it save its files beside the pictures. Nothing
here changes a picture.
"""

import argparse
import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from torch import Tensor

from ldm.diffusion.step import Step
from ldm.models.attention_maps import AttentionMaps, record
from ldm.models.deep_cache import DeepCache
from ldm.models.unet import UNet
from ldm.models.weighting import Piece, chunks
from sample.attention import token_pictures, words
from sample.images import grid, save_png, to_pil
from sample.parts import Parts
from sample.preview import PREVIEW, Previewer, due, enlarged, make_previewer, save_preview
from sample.settings import Wording
from sample.words import limit, read, weighs

FRAMES = ("gif", "sheet")
FRAME_MS = 120  # of a step in an animation; the last one stays longer
LAST_MS = 1500


@dataclass(frozen=True)
class Looking:
    """What a command wants to see of all its batches. preview: shows latents as small images."""

    pipe: Parts
    out: Path
    preview: Previewer | None = None
    file: bool = False  # whether previews go to a file, every so many steps
    every: int = 5
    frames: str | None = None
    attention: bool = False

    @contextlib.contextmanager
    def batch(self, prompts: Sequence[str], wording: Wording, steps: int) -> Iterator["Look"]:
        """Watch one batch being made in `steps` steps."""
        look = Look(self, steps)
        if not self.attention:
            yield look
            return
        [prompt] = prompts  # see `looking_of`
        said = read(self.pipe, [prompt], wording, max(steps, 1))
        # Of a prompt that changes on the way or has several parts: the first
        [_, look.pieces] = said.said[0][0][0]
        network = self.pipe.network.unet if isinstance(self.pipe.network, DeepCache) else self.pipe.network
        assert isinstance(network, UNet)
        with record(network, context=said.contexts[look.pieces]) as look.maps:
            yield look


@dataclass
class Look:
    """One batch: `see` each step, then `save` beside each picture."""

    looking: Looking
    steps: int
    seen: list[Tensor] = field(default_factory=list)  # of each step, small images in [-1, 1]
    done: int = 0  # steps seen, of all passes
    maps: AttentionMaps | None = None
    pieces: tuple[Piece, ...] = ()

    def see(self, step: Step) -> bool:
        """Take notice of a step; whether the preview's file was written."""
        looking = self.looking
        shown = looking.file and due(self.done, self.steps, looking.every)
        self.done += 1
        if looking.preview is None or not (shown or looking.frames):
            return False
        images = looking.preview(step.denoised)
        if looking.frames:
            self.seen.append(images)
        if shown:
            save_preview(images, looking.out / PREVIEW)
        return shown

    def save(self, path: Path, row: int, picture: Image.Image, wording: Wording) -> list[Path]:
        """Write what was seen of the picture in `row` of the batch beside its file; returns the new files."""
        files = []
        if self.seen:
            frames = [to_pil(enlarged(images[row][None]))[0] for images in self.seen]
            frames = [frame.resize(frames[-1].size) for frame in frames]  # of two passes of other proportions
            files.append(
                path.with_name(f"{path.stem}-steps.{'gif' if self.looking.frames == 'gif' else 'png'}")
            )
            save_frames(frames, files[-1])
        if self.maps is not None and self.maps.total is not None:  # a step was taken
            pipe = self.looking.pipe
            ids = chunks(self.pieces, pipe.tokenizer, 0 if limit(pipe, wording) else wording.backtrack)
            said = words(pipe.tokenizer, [[i for i, _ in chunk] for chunk in ids[: limit(pipe, wording)]])
            if not said:  # the empty prompt has nothing to attend to
                return files
            files.append(path.with_name(f"{path.stem}-attention.png"))
            save_png(token_pictures(self.maps.mean()[0], said, picture), files[-1])
        return files


def save_frames(frames: Sequence[Image.Image], path: Path) -> None:
    """An animation (.gif) or one picture of all frames, written atomically."""
    if path.suffix != ".gif":
        save_png(grid(list(frames)), path)
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    times = [FRAME_MS] * (len(frames) - 1) + [LAST_MS]
    try:
        frames[0].save(
            temporary, format="GIF", save_all=True, append_images=frames[1:], duration=times, loop=0
        )
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def looking_of(args: argparse.Namespace, pipe: Parts, out: Path) -> Looking:
    """What the options ask to see. `--attention` has one picture made at a time: `args.batch` becomes 1.

    Raises ValueError for values outside their range, and for a model without words to attend to.
    """
    if args.preview_every < 1:
        raise ValueError(f"--preview-every must be at least 1 step, got {args.preview_every}")
    if args.frames is not None and args.frames not in FRAMES:
        raise ValueError(f"--frames must be {' or '.join(FRAMES)}, got {args.frames!r}")
    if args.attention:
        if args.compile:
            raise ValueError("--attention looks inside blocks, which --compile makes one: drop one of them")
        if not weighs(pipe):
            raise ValueError("--attention needs a model with a CLIP text tower: this one has no words")
        args.batch = 1
    choice = args.preview or ("linear" if args.frames else None)
    previewer = None if choice is None else make_previewer(choice, pipe.autoencoder, pipe.device)
    return Looking(
        pipe, out, previewer, args.preview is not None, args.preview_every, args.frames, args.attention
    )
