"""Training sets in tar archives, as `webdataset` writes and reads them: a sample is the members of one key.

`shards/000.tar` holds `KEY.jpg` (or .png, .webp, ...) with `KEY.txt`, its caption, or `KEY.json` with the
columns of metadata.jsonl ("text" or "caption", "concept", "style", "split", "label"); `KEY.cls` is a label,
too, `KEY.mask.png` and `KEY.source.png` are the pictures of those columns. The key goes to the first dot of
the file's name. The headers are read once, for a list of where each picture stands (shard, offset, size);
after that any picture can be read at any time, so that the order of training is that of any other set.
Nothing is ever extracted: a member whose name leads out of a folder, a link or a device is skipped, and
counted.
"""

import itertools
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.entries import (
    MAX_CAPTION_FILE,
    METADATA,
    PICTURE_COLUMNS,
    SUFFIXES,
    TEXT_COLUMNS,
    Entry,
    Listing,
    file_stamp,
    text_columns,
    unsafe,
)

MAX_PICTURE_FILE = 1 << 28  # bytes
BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")
MAX_SHARDS = 1_000_000
TEXTS = ("txt", "json", "cls")  # read while a shard is listed
KINDS = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
}


@dataclass(frozen=True, slots=True)
class Piece:
    """`size` bytes of a file, from `offset` on."""

    file: Path
    offset: int
    size: int

    def read(self) -> bytes:
        try:
            with open(self.file, "rb") as file:
                file.seek(self.offset)
                content = file.read(self.size)
        except FileNotFoundError:
            raise ValueError(f"{self.file}: no such file") from None
        except OSError as error:
            raise ValueError(f"{self.file}: {error.strerror or error}") from None
        if len(content) < self.size:
            raise ValueError(f"{self.file}: it ends before byte {self.offset + self.size}, it was cut short")
        return content

    def stamp(self) -> str:
        return f"{self.offset} {self.size} {file_stamp(self.file)}"


@dataclass
class Sample:
    """The members of one key, while a shard is listed."""

    key: str
    pictures: dict[str, Piece] = field(default_factory=dict)  # by suffix
    others: list[tuple[str, Piece]] = field(default_factory=list)  # by column
    texts: dict[str, bytes] = field(default_factory=dict)
    refused: bool = False  # a member of it has been named already


def names_shards(path: str) -> bool:
    """Whether `data.path` names tar archives: one, a pattern, or a folder that holds no pictures else."""
    if path.endswith(".tar") or re.search(r"\.(tar\.\w+|tgz)$", path):
        return True
    folder = Path(path).expanduser()
    if not folder.is_dir() or (folder / METADATA).exists() or not any(folder.glob("*.tar")):
        return False
    return not any(file.suffix.lower() in SUFFIXES for file in folder.iterdir())


def expand(pattern: str) -> list[str]:
    """`{000..003}` and `{a,b}` written out, as the shell does it.

    Raises ValueError for braces with neither, and for more than a million names.
    """
    parts = BRACES.split(pattern)  # text, inside of braces, text, ...
    choices = [[text] if index % 2 == 0 else _choices(text, pattern) for index, text in enumerate(parts)]
    count = 1
    for choice in choices:
        count *= len(choice)
    if count > MAX_SHARDS:
        raise ValueError(f"data.path {pattern!r} names {count} files, more than {MAX_SHARDS}")
    return ["".join(words) for words in itertools.product(*choices)]


def _choices(inside: str, pattern: str) -> list[str]:
    if between := RANGE.fullmatch(inside):
        first, last = between.groups()
        if abs(int(last) - int(first)) >= MAX_SHARDS:
            raise ValueError(f"data.path {pattern!r} names more than {MAX_SHARDS} files")
        width = max(len(first), len(last)) if "0" in (first[0], last[0]) else 0
        step = 1 if int(first) <= int(last) else -1
        return [f"{number:0{width}d}" for number in range(int(first), int(last) + step, step)]
    if "," in inside:
        return inside.split(",")
    raise ValueError(
        f"data.path {pattern!r}: {{{inside}}} is neither a range {{000..009}} nor a list {{a,b}}"
    )


def find_shards(path: str) -> tuple[Path, list[Path]]:
    """The folder of the shards, and the shards, in order.

    Raises FileNotFoundError for one that is not there, ValueError for a compressed one.
    """
    if not path.endswith(".tar") and Path(path).expanduser().is_dir():
        root = Path(path).expanduser()
        return root, sorted(root.glob("*.tar"))
    shards = [Path(name).expanduser() for name in expand(path)]
    for shard in shards:
        if shard.suffix != ".tar":
            raise ValueError(
                f"{shard} is compressed, and so no picture of it can be read alone; unpack it to .tar"
            )
        if not shard.is_file():
            raise FileNotFoundError(f"{shard}: no such tar archive of images")
    parents = {shard.parent for shard in shards}
    while len(parents) > 1:
        deepest = max(parents, key=lambda parent: len(parent.parts))
        parents = parents - {deepest} | {deepest.parent}
    return parents.pop(), shards


def list_shards(path: str, caption_column: str) -> Listing:
    """The samples of all shards, in their order; a picture is named `000.tar/KEY.jpg`, under their folder."""
    root, shards = find_shards(path)
    listing = Listing(root, [])
    for shard in shards:
        for sample in _samples(shard, listing.skipped):
            try:
                listing.entries.append(_entry(sample, shard, caption_column))
            except ValueError as error:
                if not sample.refused:
                    listing.skipped.append(f"{shard}: {error}")
    return listing


def _entry(sample: Sample, shard: Path, caption_column: str) -> Entry:
    if len(sample.pictures) != 1:
        told = "more than one picture" if sample.pictures else "no picture"
        raise ValueError(f"{sample.key} has {told}")
    suffix, piece = next(iter(sample.pictures.items()))
    values = dict.fromkeys((caption_column, *TEXT_COLUMNS), "")
    more: dict[str, Any] = {}
    for column, other in sample.others:
        if more.setdefault(column, other) is not other:
            raise ValueError(f"{sample.key} has more than one {column}")
    if "json" in sample.texts:
        try:
            row = json.loads(sample.texts["json"].decode("utf-8-sig"))
            if not isinstance(row, dict):
                raise ValueError(f"a JSON object is needed, got {type(row).__name__}")
            if caption_column not in row and "caption" in row:  # as img2dataset writes it
                row[caption_column] = row["caption"]
            values = text_columns(row, (caption_column, *TEXT_COLUMNS))
            more |= {"label": row["label"]} if "label" in row else {}
        except json.JSONDecodeError as error:
            raise ValueError(f"{sample.key}.json: not a JSON object ({error.msg})") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{sample.key}.json: {' '.join(str(error).split())}") from None
    caption = values[caption_column].strip()
    if "txt" in sample.texts:
        try:
            caption = " ".join(sample.texts["txt"].decode("utf-8-sig").split())
        except UnicodeDecodeError:
            raise ValueError(f"{sample.key}.txt: not UTF-8 text") from None
    if "cls" in sample.texts:
        try:
            more["label"] = int(sample.texts["cls"].decode("ascii"))
        except ValueError:
            raise ValueError(f"{sample.key}.cls: not a whole number") from None
    file, kind = shard / f"{sample.key}{suffix}", values["split"] or None
    return Entry(file, caption, values["concept"], values["style"], kind, stored=piece, more=more or None)


def _samples(shard: Path, skipped: list[str]) -> Iterator[Sample]:
    """The samples of a shard, whose members stand side by side; what is left out is told in `skipped`."""
    sample = Sample("")
    try:
        size = shard.stat().st_size
        with tarfile.open(shard, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it keeps them all
                folder, _, base = member.name.rpartition("/")
                stem, dot, suffix = base.partition(".")
                if member.isdir() or not stem or not dot:  # no part of a sample, as a README
                    if not member.isdir() and (told := _refused(member, size)):
                        skipped.append(f"{shard}: {member.name!r:.200} {told}")
                    continue
                key, suffix = f"{folder}/{stem}" if folder else stem, suffix.lower()
                if key != sample.key:
                    if sample.key:
                        yield sample
                    sample = Sample(key)
                if told := _refused(member, size):
                    sample.refused = True
                    skipped.append(f"{shard}: {member.name!r:.200} {told}")
                elif f".{suffix}" in SUFFIXES:
                    # Two of one name count as two, too
                    slot = f".{suffix}" if f".{suffix}" not in sample.pictures else f".{suffix} again"
                    sample.pictures[slot] = Piece(shard, member.offset_data, member.size)
                elif (column := _picture_column(suffix)) is not None:
                    sample.others.append((column, Piece(shard, member.offset_data, member.size)))
                elif suffix in TEXTS:
                    opened = tar.extractfile(member)  # a view of the archive, nothing is written
                    assert opened is not None
                    sample.texts[suffix] = opened.read(MAX_CAPTION_FILE)
            tar.fileobj.seek(tar.offset)
            rest = tar.fileobj.read(tarfile.BLOCKSIZE)
            if rest.strip(b"\0"):  # the library takes any rubbish for the end of the archive
                raise ValueError(f"no header at byte {tar.offset}")
    except Exception as error:  # whatever the library stumbles over in a damaged archive
        reason = " ".join(str(error).split()) or type(error).__name__
        skipped.append(
            f"{shard}: a damaged or compressed tar archive, of which the rest is lost ({reason:.140})"
        )
    if sample.key:
        yield sample


def _picture_column(suffix: str) -> str | None:
    """ "mask" for "mask.png"."""
    column, _, kind = suffix.rpartition(".")
    return column if column in PICTURE_COLUMNS and f".{kind}" in SUFFIXES else None


def _refused(member: tarfile.TarInfo, end: int) -> str:
    """Why a member is not read, "" where it is: it is no plain file, has a bad name, or is not all there."""
    if member.type in KINDS:
        return f"is {KINDS[member.type]}, which is refused"
    if not member.isreg() or member.issparse():
        return "is no plain file, and is refused"
    if told := unsafe(member.name):
        return f"{told}, and is refused"
    if member.offset_data + member.size > end or member.size < 0:
        return "is cut short"
    text = member.name.lower().endswith(tuple(f".{suffix}" for suffix in TEXTS))
    if member.size > (MAX_CAPTION_FILE if text else MAX_PICTURE_FILE):
        return f"has {member.size} bytes, too many"
    return ""
