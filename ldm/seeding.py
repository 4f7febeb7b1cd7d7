"""Randomness as a function of what it is for: (seed, step, part) in training, (seed, image) in sampling.

Every draw comes from its own CPU generator, so that a resumed run draws what an uninterrupted one would,
and a picture does not depend on the batch it was made in, nor on the device.
"""

import hashlib

import torch


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by a hash of `key`, such as `generator(seed, "noise", step)`."""
    return torch.Generator().manual_seed(derive(*key))


def derive(*key: int | str) -> int:
    """A 63-bit seed from `key`; keys that differ anywhere give unrelated seeds."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
