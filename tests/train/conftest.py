"""What several tests of training share."""

import pytest
from tiny_task import TinyTask, config_of

from train.loop import train


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory):
    """The folder of a finished run of the tiny task, to which broken ones are compared; not to be written to."""
    folder = tmp_path_factory.mktemp("unbroken")
    assert train(TinyTask(config_of(folder)), False, "") == folder / "model"
    return folder
