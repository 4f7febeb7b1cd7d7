"""What several tests of the models use."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def no_grad() -> Iterator[None]:
    """As in sampling, where the networks work in place."""
    with torch.no_grad():
        yield
