"""Training a ControlNet: the model stays as it is, hints teach, a run resumes exactly, its file steers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import randomised
from PIL import Image, ImageDraw

from ldm.config import load_config
from ldm.diffusion.schedule import DiffusionConfig
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.clip import TextConfig, TextEncoder
from ldm.models.controlnet import ControlNet
from ldm.models.unet import UNet, UNetConfig
from ldm.weights.controlnet import load_controlnet
from ldm.weights.folder import save_part
from ldm.weights.io import load_weights, read_header
from sample.__main__ import main as sample
from sample.control_error import control_errors, hints_of
from sample.images import read_rgb
from sample.pipeline import Pipeline
from train.__main__ import main as train
from train.tasks.controlnet import ControlNetTask, ControlNetTaskConfig

pytest.importorskip("cv2")
TINY = "configs/train/tiny_controlnet.yaml"
RUN = [
    "run.device=cpu",
    "run.steps=4",
    "run.batch=4",
    "run.warmup=0",
    "run.checkpoint_every=2",
    "run.validate_every=2",
    "run.preview_every=0",
    "preview.steps=2",
    "controlled=2",
]
UNET = UNetConfig(
    model_channels=16,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(2,),
    num_heads=2,
    norm_groups=4,
    context_dim=16,
    sample_size=16,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Pictures of boxes, and below `model` a model of random weights for them."""
    folder, rng = tmp_path_factory.mktemp("hinted"), np.random.default_rng(0)
    rows = []
    for number in range(10):
        picture = Image.new("RGB", (32, 32), "white")
        low = rng.integers(2, 14, 2)
        ImageDraw.Draw(picture).rectangle([*low.tolist(), *(low + 12).tolist()], fill=(200, 30, 30))
        picture.save(folder / f"{number}.png")
        split = "heldout_image" if number > 7 else "train"
        rows.append({"file_name": f"{number}.png", "text": f"box {number}", "split": split})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    torch.manual_seed(0)
    stage = AutoencoderConfig(base_channels=4, channel_mult=(1, 1), num_res_blocks=1, norm_groups=2)
    text = TextEncoder(TextConfig(width=16, layers=1, heads=2, mlp_width=32))
    parts = [randomised(each) for each in (UNet(UNET), AutoencoderKL(stage), text)]
    Pipeline(*parts, DiffusionConfig(prediction="v"), device="cpu").save(folder / "model", torch.float32)
    return folder


def options(folder: Path, out: Path, *more: str) -> list[str]:
    return [
        "controlnet",
        TINY,
        f"data.path={folder}",
        f"model={folder / 'model'}",
        f"run.out={out}",
        *RUN,
        *more,
    ]


def task_of(folder: Path, out: Path, *more: str) -> ControlNetTask:
    return ControlNetTask(load_config(ControlNetTaskConfig, TINY, options(folder, out, *more)[2:]))


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def changed(before: dict[str, torch.Tensor], module: torch.nn.Module) -> list[str]:
    return [name for name, tensor in module.state_dict().items() if not torch.equal(before[name], tensor)]


def test_at_first_nothing_is_changed(folder, tmp_path):
    """Zero convolutions: the controlled prediction is the model's, bit for bit, and so is its loss."""
    task = task_of(folder, tmp_path)
    x, t = torch.randn(3, 4, 16, 16), torch.tensor([0, 10, 900])
    context, hint = torch.randn(3, 77, 16), torch.rand(3, 3, 32, 32)
    assert torch.equal(task.network(x, t, hint=hint, context=context), task.unet(x, t, context))
    assert isinstance(task.controlnet, ControlNet)
    assert task.controlnet.config.hint_widths == (16, 32)  # two, for an autoencoder with factor 2


def test_only_the_controlnet_learns(folder, tmp_path):
    task = task_of(folder, tmp_path)
    loss, _ = task.loss(0, 0)
    loss.backward()
    assert all(p.grad is None for p in [*task.unet.parameters(), *task.autoencoder.parameters()])
    zero = task.controlnet.zero_convs[0]
    assert zero.weight.grad.abs().max() > 0  # the first to learn; what is behind it has no gradient yet
    assert task.controlnet.conv_in.weight.grad.abs().max() == 0


def test_a_run_changes_the_controlnet_alone_and_steers(folder, tmp_path, capsys):
    before = {path.name: path.read_bytes() for path in (folder / "model").iterdir()}
    assert (
        train(options(folder, tmp_path / "run", "run.steps=20", "run.validate_every=0", "run.lr=0.01")) == 0
    )
    assert {path.name: path.read_bytes() for path in (folder / "model").iterdir()} == before
    made = tmp_path / "run" / "model" / "controlnet.safetensors"
    assert [path.name for path in made.parent.iterdir()] == [made.name]
    about = read_header(made)[1]
    assert about["hints"]["annotators"] == ["canny"] and about["model"]["name"] == str(folder / "model")
    controlnet = load_controlnet(made)
    assert controlnet.zero_convs[0].weight.abs().max() > 1e-3
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    last = next(row for row in reversed(rows) if "control_error" in row)
    assert last["uncontrolled_error"] > 0 and {"control_difference", "validation_loss"} <= last.keys()
    command = ["txt2img", "box", "--model", str(folder / "model"), "--steps", "2", "--device", "cpu", "--out"]
    assert sample([*command, str(tmp_path / "a"), "--control", f"{made}:{folder / '9.png'}"]) == 0
    assert sample([*command, str(tmp_path / "b")]) == 0
    a, b = (np.asarray(read_rgb(next((tmp_path / name).glob("0*.png")))) for name in "ab")
    assert (a != b).any()


def test_the_decoder_by_option(folder, tmp_path):
    base = Pipeline.load(folder / "model", device="cpu").unet
    assert train(options(folder, tmp_path / "run", "unlock_decoder=true", "run.lr=0.01")) == 0
    unet = Pipeline.load(tmp_path / "run" / "model", device="cpu").unet
    names = changed({name: tensor.half().float() for name, tensor in base.state_dict().items()}, unet)
    assert names and all(name.split(".")[0] in ("up_blocks", "norm_out", "conv_out") for name in names)
    assert (tmp_path / "run" / "model" / "controlnet.safetensors").exists()


@pytest.mark.parametrize("more", [[], ["unlock_decoder=true", "hints.thick=0.5", "run.accumulate=2"]])
def test_resumed_equals_uninterrupted(folder, tmp_path, more, monkeypatch):
    assert train(options(folder, tmp_path / "whole", *more)) == 0
    loss = ControlNetTask.loss

    def unplugged(self, step, part):
        if step == 3:
            raise ValueError("the plug was pulled")
        return loss(self, step, part)

    monkeypatch.setattr(ControlNetTask, "loss", unplugged)
    assert train(options(folder, tmp_path / "broken", *more)) == 2
    monkeypatch.undo()
    assert train([*options(folder, tmp_path / "broken", *more), "--resume"]) == 0
    a, b = (
        load_weights(tmp_path / name / "states" / "step-00000004.safetensors")[0]
        for name in ("whole", "broken")
    )
    assert a.keys() == b.keys() and [name for name in a if not torch.equal(a[name], b[name])] == []
    files = [
        (tmp_path / name / "model" / "controlnet.safetensors").read_bytes() for name in ("whole", "broken")
    ]
    assert files[0] == files[1]


def test_a_hint_teaches_what_no_caption_says(folder, tmp_path):
    """Learning one batch by heart at one noise level: with hints the loss falls, far below what it was."""
    task = task_of(folder, tmp_path, "caption_dropout=1", "run.batch=8")
    task._draw, draw = lambda data, rows, *key: draw(data, rows.sort().values, "train", 0, 0), task._draw
    optimizer = torch.optim.AdamW(task.players["model"].parameters.values(), lr=3e-3)
    losses = []
    for step in range(40):
        loss, _ = task.loss(step, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses[::10]


def test_control_errors_of_the_picture_itself_and_of_another(folder):
    pixels = torch.from_numpy(np.asarray(read_rgb(folder / "0.png")).copy()).permute(2, 0, 1)[None]
    hints, images = hints_of(pixels.float() / 127.5 - 1, "canny"), pixels.float() / 127.5 - 1
    assert {name: values.tolist() for name, values in control_errors(hints, images, "canny").items()} == {
        "error": [0.0],
        "difference": [0.0],
    }
    shifted = images.roll(2, dims=3)
    errors = control_errors(hints, shifted, "canny")
    assert 0.2 < errors["error"] <= 2 and 0 < errors["difference"] < 0.2


@pytest.mark.slow
def test_two_processes_and_pieces_train_what_one_does(folder, tmp_path):
    """DDP and FSDP2 by torchrun against one process with twice the parts; hints and captions vary."""
    common = ["run.steps=2", "run.validate_every=0", "controlled=0", "hints.thick=0.5", "run.batch=4"]
    assert train(options(folder, tmp_path / "one", *common, "run.accumulate=2")) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "train"]
    for parallel in ("ddp", "fsdp"):
        command = options(folder, tmp_path / parallel, *common, f"run.parallel={parallel}")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*launcher, *command], capture_output=True, text=True, env=environment, timeout=600
        )
        assert done.returncode == 0, done.stderr
    one, *others = (
        load_weights(tmp_path / name / "model" / "controlnet.safetensors")[0]
        for name in ("one", "ddp", "fsdp")
    )
    for other in others:
        for name, tensor in one.items():
            torch.testing.assert_close(
                other[name].float(), tensor.float(), atol=2e-6, rtol=1e-3
            )  # fp16 files


def test_a_dry_run_tells_the_memory_of_a_step(folder, tmp_path, capsys):
    assert train([*options(folder, tmp_path / "run"), "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "activations of 4 images" in told and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["run.parallel=fsdp", "unlock_decoder=true"], "run.parallel=fsdp needs unlock_decoder=false"),
        (["hints.annotators=[cany]"], "no annotator 'cany'; did you mean canny?"),
        (["hint_widths=[16,32,96]"], "is for an autoencoder with factor 4, this one has 2"),
        (["preview.prompts=[a]"], "previews of a ControlNet show held-out hints"),
        (["caption_dropout=2"], "caption_dropout must be in 0..1, got 2"),
        (["data.size=21"], "sides must be multiples of"),
        (["model=nowhere"], "model 'nowhere' is no shipped name, no file and no folder"),
        (["controlled=-1"], "controlled must be at least 0 pictures"),
    ],
)
def test_mistakes_are_told_in_one_line(folder, tmp_path, capsys, more, message):
    assert train(options(folder, tmp_path / "run", *more)) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1 and message in told[0], told
    assert not (tmp_path / "run" / "model").exists()


def test_a_controlnet_of_another_model_is_refused(folder, tmp_path, capsys):
    other = randomised(UNet(UNetConfig(**{**vars(UNET), "model_channels": 32})))
    controlnet = ControlNet.from_unet(other, hint_widths=(16, 32))
    save_part(tmp_path / "controlnet.safetensors", controlnet, torch.float32)
    assert train(options(folder, tmp_path / "run", f"init_from={tmp_path / 'controlnet.safetensors'}")) == 2
    assert "model_channels 32 (the UNet's 16)" in capsys.readouterr().err
