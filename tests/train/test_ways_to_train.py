"""The options of diffusion training through the command line: several at once, resumed bit for bit; each alone."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from coloured import CLASSES, write_first_stage, write_rows
from PIL import Image

from ldm.config import load_config
from ldm.weights.io import load_weights
from sample.__main__ import main as sample
from train.__main__ import main as train
from train.columns import load_labels, picture_column, read_masks
from train.data import DataConfig, batch_indices
from train.tasks.diffusion import DiffusionTask, DiffusionTaskConfig

TINY = "configs/train/tiny.yaml"
SHORT = [
    "run.steps=6",
    "run.checkpoint_every=3",
    "run.validate_every=0",
    "run.preview_every=0",
    "run.batch=4",
    "preview.steps=1",
]
MANY = [
    "diffusion.prediction=edm",
    "diffusion.sigma_data=0.8",
    "diffusion.zero_terminal_snr=true",
    "loss.weighting=p2",
    "loss.density=lognormal",
    "loss.distance=huber",
    "noise.offset=0.1",
    "noise.pyramid=0.4",
    "noise.perturbation=0.1",
    "masked=true",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> list[str]:
    """Overrides that name a set of 10 coloured pictures, some with masks, and a first stage of random weights."""
    folder, rng = tmp_path_factory.mktemp("made"), np.random.default_rng(0)
    rows = []
    for number in range(10):
        picture = np.full((32, 32, 3), rng.integers(0, 256, 3), dtype=np.uint8)
        Image.fromarray(picture).save(folder / f"{number}.png")
        split = "heldout_image" if number > 7 else "train"
        row = {"file_name": f"{number}.png", "text": f"colour {number}", "split": split, "label": number % 3}
        rows.append(row | ({"mask": "masks/left.png"} if number % 2 else {}))
    left = np.zeros((32, 32), dtype=np.uint8)
    left[:, :14] = 255
    (folder / "masks").mkdir()
    Image.fromarray(left).save(folder / "masks" / "left.png")
    write_rows(folder, rows)
    return [f"data.path={folder}", write_first_stage(folder), "run.device=cpu", *SHORT]


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_weights(folder / "states" / f"step-{step:08d}.safetensors")[0]


def test_all_at_once_resume_bit_for_bit_and_sample(made, tmp_path, capsys):
    """An unbroken run, and a copy of it cut back to the state in its middle."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train(["diffusion", TINY, *made, *MANY, *CLASSES, f"run.out={whole}"]) == 0
    shutil.copytree(whole, cut)
    (cut / "states" / "step-00000006.safetensors").unlink()
    assert train(["diffusion", TINY, *made, *MANY, *CLASSES, f"run.out={cut}", "--resume"]) == 0
    assert "resumed at step 3" in capsys.readouterr().out
    expected, resumed = weights(whole, 6), weights(cut, 6)
    assert expected.keys() == resumed.keys()
    assert [name for name in expected if not torch.equal(expected[name], resumed[name])] == []
    how = ["--model", str(whole), "--device", "cpu", "--sampler", "dpmpp_2m", "--steps", "2"]
    assert sample(["txt2img", "2", *how, "--out", str(tmp_path / "out")]) == 0
    assert sample(["txt2img", "colour", *how, "--out", str(tmp_path / "no")]) == 2
    assert "takes a class number 0..3 as prompt" in capsys.readouterr().err


def test_labels_are_the_classes_and_dropped_ones_the_null_class(made, tmp_path):
    seen = []
    for dropout in (0.0, 1.0):
        overrides = [*made, *CLASSES, f"caption_dropout={dropout}", f"run.out={tmp_path}", "run.batch=8"]
        task = DiffusionTask(load_config(DiffusionTaskConfig, TINY, overrides))
        task.text_encoder.register_forward_pre_hook(lambda module, given: seen.append(given[0].tolist()))
        task.loss(0, 0)
    order = batch_indices(8, 8, 0, 0)
    assert seen == [(order % 3).tolist(), [3] * 8]
    assert task.data.ids.tolist() == [number % 3 for number in range(8)]  # the set itself is not changed


def load_masks(config, files, factor):
    return read_masks(picture_column(config, "mask", files), factor, (config.size, config.size))


def test_masks_are_averaged_over_the_places_of_the_latents(made):
    """14 of 32 pixels wide at a factor of 4: three and a half places; pictures without a mask count whole."""
    config = DataConfig(made[0].removeprefix("data.path="), size=32)
    masks = load_masks(config, ["1.png", "2.png"], 4)
    assert masks.shape == (2, 1, 8, 8)
    assert masks[0, 0, 5].tolist() == [1, 1, 1, 0.5, 0, 0, 0, 0]
    assert torch.equal(masks[1], torch.ones(1, 8, 8))


def test_columns_that_do_not_fit(made, tmp_path):
    folder = Path(made[0].removeprefix("data.path="))

    def config(*rows):
        (tmp_path / "metadata.jsonl").write_text(
            "".join(json.dumps({"text": "", **row}) + "\n" for row in rows)
        )
        return DataConfig(str(tmp_path), size=32)

    shutil.copy(folder / "1.png", tmp_path)
    for name in ("../1.png", "/etc/1.png", "..\\1.png", 3):
        with pytest.raises(ValueError, match="is no file name inside the folder"):
            load_masks(config({"file_name": "1.png", "mask": name}), ["1.png"], 4)
    with pytest.raises(ValueError, match="no-mask.png: no such file"):
        load_masks(config({"file_name": "1.png", "mask": "no-mask.png"}), ["1.png"], 4)
    for label in (None, 4, -1, 1.0, "1", True):
        rows = [{"file_name": "1.png", "label": label}, {"file_name": "2.png", "label": 0}]
        with pytest.raises(ValueError, match=r"1.png has .*a whole number in 0..3 is needed"):
            load_labels(config(*rows), ["1.png"], 4)
    two = [{"file_name": "1.png", "label": 0}, {"file_name": "./1.png", "label": 1}]
    with pytest.raises(ValueError, match="two rows of 1.png differ in 'label'"):
        load_labels(config(*two), ["1.png"], 4)
    with pytest.raises(ValueError, match="no row has a column 'label'"):
        load_labels(config({"file_name": "1.png"}), ["1.png"], 4)
    (tmp_path / "metadata.jsonl").unlink()
    with pytest.raises(ValueError, match="no picture has a 'label'"):
        load_labels(DataConfig(str(tmp_path)), ["1.png"], 4)


def first_loss(made: list[str], folder: Path, *overrides: str) -> float:
    task = DiffusionTask(
        load_config(DiffusionTaskConfig, TINY, [*made, *CLASSES, f"run.out={folder}", *overrides])
    )
    rng = torch.Generator().manual_seed(1)
    for parameter in task.networks.parameters():  # some start at zero, which hides the input
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=rng)
    return task.loss(0, 0)[0].item()


@pytest.fixture(scope="module")
def plain(made, tmp_path_factory) -> tuple[float, Path]:
    """The loss of the first step with no option, and the folder of that run, which holds the encoded pictures."""
    folder = tmp_path_factory.mktemp("plain")
    return first_loss(made, folder), folder


@pytest.mark.parametrize(
    "override",
    [
        *MANY[3:],
        "loss.weighting=soft_min_snr",
        "loss.weighting=edm diffusion.sigma_data=0.5",
        "loss.distance=l1",
    ],
)
def test_each_alone_changes_the_loss_of_the_first_step(made, plain, override):
    """The same weights, pictures, timesteps and white noise, so that a difference is that of the option."""
    loss = first_loss(made, plain[1], *override.split())
    assert loss != plain[0] and np.isfinite(loss)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("loss.weighting=p3", "weighting is 'p3'"),
        ("loss.huber_c=0", "huber_c must be above 0"),
        ("noise.pyramid=1", "noise.pyramid must be in"),
        ("diffusion.prediction=edn", "prediction is 'edn'"),
        ("classes.num_classes=4", "with classes, text=null is needed"),
        ("text=null classes.dim=8", "unet.context_dim 32 must equal classes.dim 8"),
        ("text=null classes.dim=32", "need classes.null_class"),
        (
            "text=null classes.dim=32 classes.null_class=3",
            "takes a class number 0..999 as prompt, got 'a red",
        ),
        ("text=null classes.dim=32 classes.null_class=1 classes.num_classes=2 preview.prompts=[]", "in 0..1"),
    ],
)
def test_bad_values_are_one_line(made, capsys, override, told):
    assert train(["diffusion", TINY, *made, *override.split()]) == 2
    line = capsys.readouterr().err.strip()
    assert told in line and "\n" not in line
