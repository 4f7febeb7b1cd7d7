"""The shipped ControlNet "emoji_edges": a drawing is followed, and filled as the prompt says."""

import json

import pytest
import torch

from ldm.config import find_config
from ldm.models.controlled import Control
from ldm.weights.controlnet import load_controlnet
from sample.__main__ import main
from sample.control_error import control_errors
from sample.hints import read_hint
from sample.images import read_parameters
from sample.model import SHIPPED
from sample.pipeline import Pipeline

pytest.importorskip("cv2")
DRAWING = find_config("configs/sample/drawing.png")
FILE = SHIPPED / "emoji_edges" / "controlnet.safetensors"
PROMPTS = [f"a {what}, openmoji emoji" for what in ("whale", "red apple", "banana", "green apple")]


@pytest.fixture(scope="module")
def emoji() -> Pipeline:
    return Pipeline.load("emoji", device="cpu")


@pytest.fixture(scope="module")
def drawn(emoji) -> dict[float, torch.Tensor]:
    """Pictures of a drawn fish by scale."""
    controlnet, hint = load_controlnet(FILE), read_hint(DRAWING)
    how = {"steps": 15, "guidance": 2.0, "seed": 3}
    return {
        scale: emoji.txt2img(PROMPTS, controls=(Control(controlnet, hint, scale),), **how)
        for scale in (0.0, 1.0)
    }


def test_the_lines_are_followed(drawn):
    """To the edges on both sides of a pen's stroke; less than half as far from them as without control."""
    hints = (read_hint(DRAWING) * 255).byte().expand(len(PROMPTS), -1, -1, -1)
    errors = {scale: control_errors(hints, images, "canny")["error"] for scale, images in drawn.items()}
    assert errors[1.0].mean() < 0.5 * errors[0.0].mean(), errors
    assert (errors[1.0] < errors[0.0]).all(), errors


def test_the_shape_is_filled_with_the_colour_of_the_prompt(drawn):
    """Mean colours inside of the drawn body: the red apple is red, the banana yellow, the green one green."""
    body = drawn[1.0][:, :, 24:40, 14:34].mean(dim=(2, 3))
    whale, red, yellow, green = body
    assert red[0] - red[1] > 0.3 and red[0] - red[2] > 0.3
    assert yellow[0] - yellow[2] > 0.3 and yellow[1] - yellow[2] > 0.3
    assert green[1] - green[2] > 0.2
    assert whale[2] > whale[0]


def test_by_its_name_on_the_command_line(tmp_path, capsys):
    command = ["txt2img", PROMPTS[0], "--control", f"emoji_edges:{DRAWING}:0.9", "--steps", "2", "--out"]
    assert main([*command, str(tmp_path)]) == 0
    [record] = read_parameters(next(tmp_path.glob("0*.png")))["control_files"]
    assert record["control"] == f"emoji_edges:{DRAWING}:0.9"
    about = json.dumps(record)
    assert "weights" in about and "hint_hash" in about
    assert FILE.stat().st_size <= 24 * 2**20
