"""The list of a training set: which pictures there are, what is said of each, and where its bytes stand.

Here is the folder of picture files; `shards.py` lists tar archives, `tables.py` sets of Hugging Face. No
picture is opened for a list.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Protocol, runtime_checkable

METADATA = "metadata.jsonl"
SUFFIXES = frozenset({".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
MAX_CAPTION_FILE = 1 << 20  # bytes; a caption is a sentence, a larger .txt is something else
TEXT_COLUMNS = ("concept", "style", "split")  # of ours, beside the caption
PICTURE_COLUMNS = ("mask", "source")  # read by `columns.py` where a task asks for them, as "label" is


@runtime_checkable
class Stored(Protocol):
    """Where the bytes of a picture stand that is no file of its own."""

    def read(self) -> bytes:
        """The bytes. Raises ValueError that names the file, where they are gone or cut short."""
        ...

    def stamp(self) -> str:
        """Another one, whenever the bytes are others (the size and date of the file they stand in)."""
        ...


@dataclass(frozen=True, slots=True)
class Entry:
    """One picture of a set, not read yet; `source` ("metadata.jsonl line 3") is for errors.

    path: of its file, or where it would stand if it had one: `stored` says where it stands instead.
    more: what the set has in columns "label", "mask" and "source", not checked yet; of the last two a file
    name or where the picture is stored.
    """

    path: Path
    caption: str = ""
    concept: str = ""
    style: str = ""
    split: str | None = None
    source: str = ""
    stored: Stored | None = None
    more: dict[str, Any] | None = None

    def stamp(self) -> str:
        """Another one, whenever the picture is another; made without reading it."""
        return self.stored.stamp() if self.stored else file_stamp(self.path)


@dataclass(frozen=True)
class Listing:
    """A set: its pictures, in the order of training; `skipped` are one-line reasons why others are not."""

    root: Path
    entries: list[Entry]
    skipped: list[str] = field(default_factory=list)


def file_stamp(path: Path) -> str:
    """Size and date of a file; "none" where there is no such file."""
    try:
        status = path.stat()
    except OSError:
        return "none"
    return f"{status.st_size} {status.st_mtime_ns}"


def list_images(root: Path, caption_column: str = "text") -> list[Entry]:
    """The pictures of a folder, none opened yet, in the order of metadata.jsonl, else of their names."""
    if not root.exists():
        raise FileNotFoundError(f"{root}: no such folder of images")
    if not root.is_dir():
        raise NotADirectoryError(f"{root} is a file; data.path must be a folder of images")
    if (root / METADATA).is_file():
        return list(_read_metadata(root, caption_column))
    if (root / "metadata.csv").is_file():
        raise ValueError(
            f"{root / 'metadata.csv'} is not read; convert it to {METADATA}, one JSON object per line"
        )
    paths = (path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES)
    visible = (path for path in paths if not any(p.startswith(".") for p in path.relative_to(root).parts))
    return [Entry(path, _sibling_caption(path)) for path in sorted(visible) if path.is_file()]


def _sibling_caption(path: Path) -> str:
    text = path.with_suffix(".txt")
    if not text.is_file():
        return ""
    if text.stat().st_size > MAX_CAPTION_FILE:
        raise ValueError(f"{text} has {text.stat().st_size} bytes, too many for a caption")
    try:
        return " ".join(text.read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError:
        raise ValueError(f"{text} is not UTF-8 text") from None


def _read_metadata(root: Path, caption_column: str) -> Iterator[Entry]:
    with open(root / METADATA, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{METADATA} line {number}"
            try:
                yield _parse_row(json.loads(line.decode("utf-8-sig")), root, caption_column, where)
            except UnicodeDecodeError:
                raise ValueError(f"{root / METADATA} line {number}: not UTF-8 text") from None
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{root / METADATA} line {number}: not a JSON object ({error.msg})"
                ) from None
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{root / METADATA} line {number}: {error}") from None


def _parse_row(row: Any, root: Path, caption_column: str, where: str) -> Entry:
    if not isinstance(row, dict):
        raise ValueError(f"a JSON object is needed, got {type(row).__name__}")
    for column in ("file_name", caption_column):
        if column not in row:
            raise ValueError(f"no column {column!r}, only {', '.join(map(repr, row)) or 'none'}")
    values = text_columns(row, ("file_name", caption_column, *TEXT_COLUMNS))
    name = values["file_name"]
    if told := unsafe(name):
        raise ValueError(f"file_name {name!r} {told}")
    caption = values[caption_column].strip()
    more = {column: row[column] for column in ("label", *PICTURE_COLUMNS) if column in row} or None
    kind = values["split"] or None
    return Entry(root / name, caption, values["concept"], values["style"], kind, where, more=more)


def text_columns(row: dict[str, Any], columns: tuple[str, ...]) -> dict[str, str]:
    """These columns of a row, "" where it has none. Raises ValueError for one that is no text."""
    values = {}
    for column in columns:
        value = row.get(column)
        if not isinstance(value, str | None):
            raise ValueError(f"column {column!r} must be text, got {value!r:.60}")
        if any("\ud800" <= char <= "\udfff" for char in value or ""):
            raise ValueError(f"column {column!r} has half a surrogate pair, which is no text")
        values[column] = value or ""
    return values


def unsafe(name: str) -> str:
    """Why `name` may not name a file inside a set; "" where it may."""
    # Windows rules too: "..\x" and "C:\x" must not be file names here and paths elsewhere.
    parts = (*PurePosixPath(name).parts, *PureWindowsPath(name).parts)
    if not parts or "\0" in name:
        return "is no file name"
    if ".." in parts or PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor:
        return "leads out of the folder"
    return ""
