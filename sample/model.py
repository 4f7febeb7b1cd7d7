"""Which model a name or path means, which tokenizer its context takes, and whether its parts fit each other.

Small functions that `pipeline.py` and the training tasks share.
"""

import difflib
import os
from pathlib import Path
from typing import Any

from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.bert import BertTextEncoder
from ldm.models.class_embedder import ClassEmbedder, ClassTokenizer
from ldm.models.clip import TextEncoder
from ldm.models.tokenizer import Tokenizer
from ldm.models.unet import UNetConfig
from ldm.models.wordpiece import WordPieceTokenizer
from ldm.weights.folder import UNET

SHIPPED = Path(__file__).parent / "models"
ContextEncoder = TextEncoder | BertTextEncoder | ClassEmbedder
CONTEXTS = ("text", "bert", "classes")  # parts of a checkpoint that a context comes from


def make_tokenizer(encoder: ContextEncoder, vocabulary: Path | None) -> Any:
    """What turns prompts into the ids that `encoder` reads."""
    if isinstance(encoder, ClassEmbedder):
        return ClassTokenizer(encoder.config)
    if isinstance(encoder, TextEncoder):
        return Tokenizer(encoder.config.context_length, encoder.config.padding)
    return WordPieceTokenizer(vocabulary or Path("vocab.txt"), encoder.config.context_length)


def reads_text(config: UNetConfig | None) -> bool:
    """Whether the UNet attends to a text: the ADM form has no cross-attention."""
    return config is not None and config.context_dim is not None and config.attention == "transformer"


def check_fit(unet: UNetConfig, autoencoder: AutoencoderConfig, width: int | None) -> None:
    """Raises ValueError where the parts are of different models; `width` is that of the context, if any."""
    wanted = unet.context_dim if reads_text(unet) else None
    if wanted != width:
        raise ValueError(f"the UNet reads a context of width {wanted}, the text encoder gives {width}")
    if not unet.in_channels >= unet.out_channels == autoencoder.latent_channels:
        raise ValueError(
            f"the UNet takes {unet.in_channels} channels and gives {unet.out_channels}, the autoencoder has "
            f"{autoencoder.latent_channels}; the last two must be equal, and the first no less"
        )


def find_model(name_or_path: str | Path, file: str = UNET, what: str = "model") -> Path:
    """The folder of a shipped name, one that holds `file`, or the path itself.

    A shipped name wins over a folder of that name in the working folder, which is `./name`. Raises
    FileNotFoundError, which lists the shipped names.
    """
    shipped = sorted(path.parent.name for path in SHIPPED.glob(f"*/{file}"))
    if str(name_or_path) in shipped:
        return SHIPPED / str(name_or_path)
    path = Path(name_or_path).expanduser()
    if not os.path.lexists(path):
        near = difflib.get_close_matches(str(name_or_path), shipped, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        names = ", ".join(shipped) or "none"
        raise FileNotFoundError(
            f"{what} {str(name_or_path)!r} is no shipped name, no file and no folder; {hint}shipped: {names}"
        )
    return path
