"""A few emoji in a drawing style that the shipped model never saw, for LoRA, DreamBooth, textual inversion.

    ldm-train prepare style DIR      ->      DIR/1f98a.png ...   DIR/metadata.jsonl   DIR/README.md

The style is Twemoji, from npm; its tarball is read without unpacking it. Five pictures of things that the
model knows from other styles are for training, others of the style are held out, to compare with. Their
captions are like those of the emoji set (`prepare.py`), "a fox, twemoji emoji", so that a training with
`subject.templates=[own]` learns what the last words mean.
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from train.emoji_names import concept_key, emoji_concepts, make_slug, with_article
from train.emoji_sources import fetch_npm_packages, missing_extra, tarball_pictures
from train.prepare import check_target, square_on_white

STYLE = "twemoji"
SOURCE = {STYLE: ("emoji-datasource-twitter@16.0.0", "package/img/twitter/64")}
TAUGHT = ("fox", "red apple", "police car", "octopus", "sunflower")
HELD_OUT = (
    "panda", "cactus", "banana", "pizza", "rainbow", "snowman", "rocket", "bus", "key", "blue heart", "ghost",
    "skull", "penguin", "strawberry", "frog", "crown",
)  # fmt: skip
NOTICE = """\
# Emoji of one drawing style

{count} pictures of {size} x {size} pixels, RGB on white, written by `ldm-train prepare style`. A row of
`metadata.jsonl` for each: file_name, text (its caption), concept, style, split ("train" or "heldout_image").

Twemoji, graphics by Twitter, Inc. and other contributors, from npm {package}: CC BY 4.0
(https://creativecommons.org/licenses/by/4.0/). The pictures were resized and composited on white.
"""


@dataclass(frozen=True)
class Style:
    """What `prepare_style` wrote."""

    directory: Path
    taught: int
    held_out: int

    def __str__(self) -> str:
        return f"{self.taught} images to learn from and {self.held_out} held out in {self.directory}"


def prepare_style(
    directory: str | Path,
    concepts: Sequence[str] = TAUGHT,
    size: int = 64,
    tarball: str | Path | None = None,
    progress: bool = True,
) -> Style:
    """Write pictures of `concepts`, to learn from, and those of `HELD_OUT` that are none of them.

    tarball: of the npm package, where it is on disk; None downloads it with `npm pack`. Everything is written
    into a sibling folder that takes its final name at the end. Raises ValueError for concepts that have no
    picture, a bad size, a folder that is not empty, a bad tarball, and where npm cannot download.
    """
    target = Path(directory).resolve()
    check_target(target, size)
    try:
        known = emoji_concepts()
    except ImportError as error:
        raise missing_extra(error) from None
    wanted = dict.fromkeys(concepts, "train") | {
        name: "heldout_image" for name in HELD_OUT if name not in concepts
    }
    if unknown := wanted.keys() - {name for _, name in known.values()}:
        raise ValueError(f"--concepts: {min(unknown)!r} is the name of no emoji, such as {', '.join(TAUGHT)}")
    if not concepts:
        raise ValueError("--concepts names no emoji to learn from")
    work = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        work.mkdir(parents=True)
        path = fetched(work / "npm", progress) if tarball is None else Path(tarball)
        rows = {}
        for sequence, picture in tarball_pictures(path, SOURCE[STYLE][1]):
            found = known.get(concept_key(sequence))
            if found is not None and found[1] in wanted and found[1] not in rows:
                name = f"{make_slug(found[0])}.png"
                square_on_white(picture, size).save(work / name)
                text = f"{with_article(found[1])}, {STYLE} emoji"
                values = (name, text, found[1], STYLE, wanted[found[1]])
                rows[found[1]] = dict(
                    zip(("file_name", "text", "concept", "style", "split"), values, strict=True)
                )
        if missing := [name for name in concepts if name not in rows]:
            raise ValueError(f"{path}: no picture of {missing[0]!r} in it")
        shutil.rmtree(work / "npm", ignore_errors=True)
        ordered = [rows[name] for name in wanted if name in rows]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ordered)
        (work / "metadata.jsonl").write_text(lines, encoding="utf-8")
        notice = NOTICE.format(count=len(rows), size=size, package=SOURCE[STYLE][0])
        (work / "README.md").write_text(notice, encoding="utf-8")
        if target.exists():
            target.rmdir()  # empty, as checked; Windows cannot rename onto it
        os.rename(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    taught = sum(row["split"] == "train" for row in ordered)
    return Style(Path(directory), taught, len(ordered) - taught)


def fetched(folder: Path, progress: bool) -> Path:
    """The package's tarball, through the user's own npm. Raises ValueError where that fails."""
    notices: list[str] = []
    found = fetch_npm_packages(folder, notices, progress, SOURCE)
    if STYLE not in found:
        raise ValueError(
            f"{'; '.join(notices)}; download {SOURCE[STYLE][0]} and give --npm-package {STYLE}=FILE"
        )
    return found[STYLE]
