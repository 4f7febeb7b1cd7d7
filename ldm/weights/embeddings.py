"""Files of textual inversion's new words: read whatever form they have, write the forms others read.

diffusers   .safetensors or .bin: {token: (V, D) or (D,)}
original    .pt: {"string_to_param": {token: (V, D)}, ...}, also the web UI's, whose token is always "*"
webui       .safetensors: {"emb_params": (V, D)}, of kohya's scripts too; .png: see `embedding_pictures.py`
lora        .safetensors of cloneofsimo's scripts: new words beside a LoRA, marked in the header

A file that does not name its word (`*`, `emb_params`) means its own name without the suffix, as in the web
UI. Pickles are read by `pickles.py` alone. Everything here raises ValueError in one line that names the file.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ldm.models.textual_inversion import WIDTHS
from ldm.weights.embedding_pictures import SUFFIXES, NoEmbedding, read_picture, write_picture
from ldm.weights.io import Refusal, appearing, one_line, save_weights
from ldm.weights.source import Source, open_source

UNNAMED = ("*", "emb_params")
FORMS = {"diffusers": (".safetensors", ".bin"), "original": (".pt",), "webui": (".safetensors", ".png")}
MAX_TOKENS = 100


@dataclass(frozen=True)
class Embedding:
    """A new word and its vectors, in the number format of the file."""

    token: str
    vectors: Float[Tensor, "V D"]


@dataclass(frozen=True)
class EmbeddingFile:
    """What a file holds. notes: what its maker says of it, such as steps and model."""

    form: str
    embeddings: tuple[Embedding, ...]
    notes: dict[str, str | int]


def read_embeddings(path: str | Path, token: str | None = None) -> EmbeddingFile:
    """The words of a file. token: what to call its one word instead.

    Raises FileNotFoundError; NoEmbedding for a file of something else; ValueError for one that is damaged,
    for values that are not finite, Stable Diffusion XL's embeddings, and a name for several words.
    """
    path = Path(path)
    if path.suffix.lower() in SUFFIXES:
        tensors, notes = read_picture(path)
        form, stem = "webui", str(notes.get("name") or path.stem)
    else:
        source = open_source(path)
        form, names = _form_of(source)
        with warnings.catch_warnings():  # told below
            warnings.simplefilter("ignore")
            tensors = dict(source.read(names, allow_nan=True))
        notes, stem = _notes(source), path.stem
    for name, tensor in tensors.items():
        _check(path, name, tensor)
    if token is not None and len(tensors) > 1:
        raise Refusal(path, f"holds {len(tensors)} words ({', '.join(tensors)}), so none can be renamed")
    named = {token or (stem if name in UNNAMED else name): value for name, value in tensors.items()}
    for name in named:
        if not name.strip() or not name.isprintable():
            raise Refusal(path, f"names its word {name!r}, which no prompt can say; give it another name")
    found = [Embedding(name, torch.atleast_2d(value).clone()) for name, value in named.items()]
    return EmbeddingFile(form, tuple(found), notes)


def write_embeddings(
    path: str | Path, embeddings: Sequence[Embedding], form: str | None = None, step: int | None = None
) -> None:
    """Write words to a new or older file, atomically; what its suffix suggests, or another `form` of FORMS.

    A file of a web UI's form holds one word, by its file's name. step: of the training, where the form has a
    place for it. Raises ValueError for a form and a suffix that do not go together, and several words where
    one has its place.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    form = form or next((form for form, suffixes in FORMS.items() if suffix in suffixes), "diffusers")
    if suffix not in FORMS.get(form, ()):
        known = "; ".join(f"{form} {' or '.join(suffixes)}" for form, suffixes in FORMS.items())
        raise Refusal(path, f"cannot be written as {form!r} with suffix {suffix!r}; known: {known}")
    if form != "diffusers" and len(embeddings) != 1:
        raise Refusal(path, f"cannot hold {len(embeddings)} words: the form {form} has one")
    tensors = {each.token: each.vectors.detach().cpu().contiguous() for each in embeddings}
    [first, *_] = embeddings
    told: dict[str, Any] = {"name": first.token} if step is None else {"name": first.token, "step": step}
    if suffix == ".png":
        write_picture(path, tensors[first.token], told)
    elif suffix == ".safetensors":
        named = {"emb_params": tensors[first.token]} if form == "webui" else tensors
        save_weights(path, named, {} if step is None else {"step": str(step)})
    else:
        table = {"string_to_token": {"*": 265}, "string_to_param": {"*": tensors[first.token]}, **told}
        with appearing(path) as file:
            torch.save(tensors if form == "diffusers" else table, file)


def convert(source: str | Path, path: str | Path, form: str | None = None, token: str | None = None) -> Path:
    """Write the words of a file to a new one; returns its path. token: what to call its one word.

    Raises ValueError as `read_embeddings` and `write_embeddings`, and where the new file exists.
    """
    path = Path(path)
    if path.exists():
        raise Refusal(path, "exists already; choose another name, or remove it")
    found = read_embeddings(source, token)
    step = str(found.notes.get("step"))
    write_embeddings(path, found.embeddings, form, int(step) if step.isdecimal() else None)
    return path


def described(path: str | Path) -> str:
    """What a file holds, in lines for a terminal."""
    found = read_embeddings(path)
    lines = [one_line(str(path)), f"  form      {found.form}"]
    for each in found.embeddings:
        count, width = each.vectors.shape
        dtype = str(each.vectors.dtype).removeprefix("torch.")
        norm = float(each.vectors.float().norm(dim=1).mean())
        model = WIDTHS.get(width, "no model that is known")
        vectors = f"{count} vector{'s' * (count > 1)} of width {width} ({model})"
        lines.append(f"  word      {one_line(each.token)}: {vectors}, {dtype}, mean norm {norm:.3f}")
    lines += [f"  {name:<9} {one_line(str(value))}" for name, value in found.notes.items()]
    return "\n".join(lines)


def _form_of(source: Source) -> tuple[str, list[str]]:
    """The form of a file and the names of its words' tensors, told by names and shapes alone."""
    names = [*source.entries]
    marked = [name for name in names if source.metadata.get(name) == "<embed>"]
    if marked:
        return "lora", marked
    if {"clip_l", "clip_g"} & set(names):
        raise NoEmbedding(
            source.path,
            f"is an embedding for Stable Diffusion XL or 3 ({', '.join(names[:5])}); only those of one text "
            "tower are read",
        )
    shapes = [entry.shape for entry in source.entries.values()]
    alike = len({shape[-1] for shape in shapes if shape}) == 1
    if not names or len(names) > MAX_TOKENS or not alike or any(not 1 <= len(shape) <= 2 for shape in shapes):
        raise NoEmbedding(
            source.path,
            f"is no embedding: it holds {len(names)} tensors, such as {', '.join(names[:3]) or 'none'}; "
            "expected vectors of one width by the name of their word",
        )
    if "emb_params" in names:
        return "webui", names
    return ("original" if "*" in names else "diffusers"), names


def _check(path: Path, name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise Refusal(path, f"holds {name} as {tensor.dtype}; vectors are floating-point numbers")
    if not 1 <= tensor.ndim <= 2 or not tensor.numel():
        raise Refusal(path, f"holds {name} of shape {(*tensor.shape,)}; expected (vectors, width)")
    if not bool(torch.isfinite(tensor.float()).all()):
        raise Refusal(path, f"holds NaN or infinite values for {name}; the file is damaged")


def _notes(source: Source) -> dict[str, str | int]:
    kept = ("name", "step", "sd_checkpoint", "sd_checkpoint_name")
    return {key: source.metadata[key] for key in kept if isinstance(source.metadata.get(key), str | int)}
