"""Training sets of Hugging Face `datasets` that are on disk: `data.path=hf:FOLDER`.

The folder is what `save_to_disk` wrote, or one of parquet files (or a single such file), or any other that
`datasets.load_dataset` reads. Nothing is downloaded. The library keeps the tables on disk and reads rows when
they are asked for; pictures are decoded here, as all others. Columns "label" (whole numbers or classes),
"mask" and "source" (pictures) are those of metadata.jsonl. It is the package's extra "data".
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.weights.io import one_line
from train.entries import PICTURE_COLUMNS, TEXT_COLUMNS, Entry, Listing, file_stamp, text_columns

TABLE = "hf:"


@dataclass(frozen=True, slots=True)
class Row:
    """The picture of a row. `rows` is a table whose one column is `column`; `root` what it was read from."""

    rows: Any
    column: str
    index: int
    root: Path
    table_stamp: str

    def read(self) -> bytes:
        try:
            value = self.rows[self.index][self.column]
        except Exception as error:  # Arrow raises what it stumbles over
            raise ValueError(
                f"{self.root}: row {self.index} cannot be read ({one_line(str(error)):.140})"
            ) from None
        if isinstance(value, dict) and value.get("bytes") is None:
            return self._of_file(value.get("path"))
        content = value["bytes"] if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            raise ValueError(f"{self.root}: row {self.index} has no picture in column {self.column!r}")
        return content

    def _of_file(self, name: Any) -> bytes:
        """A picture that the table only names; it must stand in the table's folder."""
        if not isinstance(name, str):
            raise ValueError(f"{self.root}: row {self.index} has no picture in column {self.column!r}")
        folder = self.root if self.root.is_dir() else self.root.parent
        file = (folder / name).resolve()
        if "\0" in name or not file.is_relative_to(folder.resolve()):
            raise ValueError(
                f"{self.root}: row {self.index} names {name!r:.200}, which leads out of the folder"
            )
        try:
            return file.read_bytes()
        except OSError as error:
            raise ValueError(f"{file}: {error.strerror or error}") from None

    def stamp(self) -> str:
        return f"{self.index} {self.table_stamp}"


def list_table(path: str, split: str, image_column: str, caption_column: str) -> Listing:
    """The rows of a table; an empty `caption_column` takes no captions.

    Raises ValueError where the package is missing, or what the folder holds is no such set or lacks the
    split or a column, FileNotFoundError where there is no such folder.
    """
    root = Path(path.removeprefix(TABLE)).expanduser()
    if not root.exists():
        raise FileNotFoundError(f"{root}: no such folder of a Hugging Face data set")
    try:
        import datasets  # noqa: F401  # by those below
    except ImportError:
        raise ValueError(
            f"data.path {path} needs the package datasets: pip install 'latent-diffusion-from-scratch[data]'"
        ) from None
    try:
        table = _opened(root)
    except Exception as error:  # damaged or foreign folders make it raise nearly anything
        raise ValueError(
            f"{root}: no data set that datasets can read ({one_line(str(error)):.300})"
        ) from None
    if isinstance(table, dict):  # of splits
        if split not in table:
            raise ValueError(f"{root}: no split {split!r} (data.split), only {', '.join(map(repr, table))}")
        table = table[split]
    for key, column in (("image_column", image_column), ("caption_column", caption_column)):
        if column not in table.column_names and (column or key == "image_column"):
            known = ", ".join(map(repr, table.column_names))
            raise ValueError(f"{root}: no column {column!r} (data.{key}), only {known}")
    try:
        pictures = _pictures(table, image_column)
    except Exception as error:
        told = f"{root}: column {image_column!r} (data.image_column) has no pictures"
        raise ValueError(f"{told} ({one_line(str(error)):.140})") from None
    stamp = " ".join(file_stamp(Path(file["filename"])) for file in table.cache_files) or table._fingerprint
    columns = [column for column in TEXT_COLUMNS if _is_text(table.features.get(column))]
    columns += [caption_column] if caption_column and caption_column not in columns else []
    texts = table.select_columns(columns).with_format(None)[:] if columns else {}
    names = {column: _reading(table.features[column]) for column in columns}
    more = _more(table, root, stamp)
    listing = Listing(root, [])
    for index in range(len(table)):
        try:
            row = {column: names[column](texts[column][index]) for column in columns}
            values = text_columns(row, (caption_column, *TEXT_COLUMNS) if caption_column else TEXT_COLUMNS)
        except ValueError as error:
            listing.skipped.append(f"{root}: row {index}: {error}")
            continue
        caption = values.get(caption_column, "").strip()
        of_row = Row(pictures, image_column, index, root, stamp)
        name = root / f"{split}-{index:08d}"
        kind = values["split"] or None
        listing.entries.append(
            Entry(
                name, caption, values["concept"], values["style"], kind, stored=of_row, more=more.get(index)
            )
        )
    return listing


def _pictures(table: Any, column: str) -> Any:
    """A column alone, its pictures as bytes or file names."""
    import datasets

    return table.select_columns([column]).cast_column(column, datasets.Image(decode=False))


def _more(table: Any, root: Path, stamp: str) -> dict[int, dict[str, Any]]:
    """What each row has in columns "label", "mask" and "source", where the table has such columns."""
    more: dict[int, dict[str, Any]] = defaultdict(dict)
    if "label" in table.column_names and "int" in getattr(table.features["label"], "dtype", ""):
        missing = -1 if type(table.features["label"]).__name__ == "ClassLabel" else None  # of no class
        for index, label in enumerate(table.select_columns(["label"]).with_format(None)[:]["label"]):
            if label not in (None, missing):
                more[index]["label"] = label
    for column in PICTURE_COLUMNS:
        if column not in table.column_names:
            continue
        try:
            pictures = _pictures(table, column)
        except Exception:  # text, say, which happens to be called so
            continue
        index = 0
        for part in pictures.with_format("arrow").iter(batch_size=1000):
            for there in part[column].is_valid().to_pylist():  # asks no picture
                if there:
                    more[index][column] = Row(pictures, column, index, root, stamp)
                index += 1
    return more


def _opened(root: Path) -> Any:
    """A `datasets.Dataset`, or a table of several by split."""
    import datasets

    if (root / "dataset_dict.json").is_file() or (root / "state.json").is_file():
        return datasets.load_from_disk(str(root))
    if root.is_file():
        return datasets.load_dataset("parquet", data_files=str(root))
    return datasets.load_dataset(str(root))


def _reading(feature: Any) -> Any:
    """What makes text of a column's values: numbers of classes become the classes' names, of several captions
    the first is taken."""
    if type(feature).__name__ == "ClassLabel":
        return lambda value: feature.int2str(value) if isinstance(value, int) and value >= 0 else ""
    return _first


def _is_text(feature: Any) -> bool:
    return (
        getattr(feature, "dtype", "") in ("string", "large_string") or type(feature).__name__ == "ClassLabel"
    )


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value else value
