"""Files that a run reads besides its set and does not train: a first stage, a frozen tower, a judge.

A state tells what was in them, and --resume refuses others: the rest of a run would learn something else.
What a run only starts from (`init_from`, a tower that is trained) is not among them.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from ldm.config import to_dict


def fingerprint(module: nn.Module) -> str:
    """12 hexadecimal digits that change with any weight, and not with the device it is on."""
    digest = hashlib.blake2b(digest_size=6)
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def require_given(before: Mapping[str, str] | None, now: Mapping[str, str], config: Any) -> None:
    """before: of a state, None where it was written before states told. Both: a hash by the configuration's
    key that names the file. Raises ValueError where a file is another one."""
    for key, told in (before or {}).items():
        if key in now and now[key] != told:
            name = OmegaConf.select(OmegaConf.create(to_dict(config)), key)
            raise ValueError(
                f"--resume with another file: {key} {name} has changed since the state was written "
                f"({told} -> {now[key]}); restore it or start a new run.out="
            )
