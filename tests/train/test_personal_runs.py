"""What textual inversion and LoRA write works in the commands; several processes; DreamBooth's second stage."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from networks import randomised
from personal import make, options

from ldm.config import to_dict
from ldm.diffusion.schedule import DiffusionConfig
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.unet import UNet, UNetConfig
from ldm.weights.folder import save_part
from ldm.weights.io import load_weights
from sample.__main__ import main as sample
from sample.images import read_rgb
from train.__main__ import main as train

FAST = ["run.validate_every=0", "run.checkpoint_every=0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make(tmp_path_factory.mktemp("runs"))


def painted(folder: Path, out: Path, *more: str) -> bytes:
    how = [
        "--model",
        str(folder / "model"),
        "--steps",
        "3",
        "--size",
        "32x32",
        "--device",
        "cpu",
        "--out",
        str(out),
    ]
    assert sample(["txt2img", "a <toy> in snow", *how, *more]) == 0
    [picture] = out.glob("*.png")
    return read_rgb(picture).tobytes()


def test_five_pictures_to_a_file_to_a_picture(folder, tmp_path):
    """Pivotal tuning: a LoRA and a new word. Each file changes the picture, both change it again."""
    more = ["tokens.words=[<toy>]", "subject.identifier=<toy>", "run.lr=0.05", "lora_text.rank=2", *FAST]
    assert train(options("lora", folder, tmp_path / "run", *more)) == 0
    lora = ["--lora", str(tmp_path / "run" / "model" / "lora.safetensors")]
    word = ["--embedding", str(tmp_path / "run" / "model" / "embedding.safetensors")]
    ways = ([], lora, word, [*lora, *word])
    assert len({painted(folder, tmp_path / str(i), *way) for i, way in enumerate(ways)}) == 4


def test_dreambooth_writes_a_model(folder, tmp_path):
    assert train(options("dreambooth", folder, tmp_path / "run", "run.lr=0.01", *FAST)) == 0
    plain = painted(folder, tmp_path / "a")
    assert painted(folder, tmp_path / "b", "--model", str(tmp_path / "run")) != plain


def test_two_processes_train_as_one(tmp_path):
    """Each makes its share of the class's pictures; the states are equal up to the order of sums."""
    script = Path(__file__).with_name("personal_ranks.py")
    path = [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {path}; sys.argv[0] = {str(script)!r}\n"]
    command[2] += "import runpy; runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=300, check=False)
    jobs = dict(map(json.loads, done.stdout.splitlines()))
    assert jobs == {"lora1": [["", None]], "lora2": [["", None]] * 2}, done.stderr[-2000:]
    one, two = (
        load_weights(tmp_path / f"lora{n}" / "states" / "step-00000004.safetensors")[0] for n in (1, 2)
    )
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=2e-4, rtol=1e-3, msg=name)
    pictures = [sorted((tmp_path / f"lora{n}" / "cache").glob("class-*/*.png")) for n in (1, 2)]
    assert [read_rgb(a).tobytes() for a in pictures[0]] == [read_rgb(b).tobytes() for b in pictures[1]]
    assert len(pictures[0]) == 12


def test_the_upscaler_learns_the_subject_too(folder, tmp_path):
    """DreamBooth's second stage is `ldm-train diffusion` on a super-resolution model, without its noise."""
    torch.manual_seed(0)
    stage = AutoencoderConfig(base_channels=4, channel_mult=(1, 1), num_res_blocks=1, norm_groups=2)
    unet = UNetConfig(
        in_channels=7,
        model_channels=16,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(2,),
        num_heads=2,
        norm_groups=4,
        context_dim=None,
        sample_size=16,
    )
    diffusion = {"diffusion": to_dict(DiffusionConfig(prediction="v"))}
    base = tmp_path / "base"
    save_part(base / "autoencoder.safetensors", randomised(AutoencoderKL(stage)), torch.float32)
    save_part(base / "unet.safetensors", randomised(UNet(unet)), torch.float32, **diffusion)
    given = ["autoencoder", "init_from"]
    command = ["diffusion", "configs/train/tiny_dreambooth_upscaler.yaml", f"data.path={folder / 'pictures'}"]
    command += [
        f"{key}={base / 'autoencoder.safetensors' if key == 'autoencoder' else base}" for key in given
    ]
    command += ["unet.model_channels=16", "unet.norm_groups=4", "unet.sample_size=16", "run.device=cpu"]
    out = tmp_path / "run"
    assert train([*command, f"run.out={out}", "run.steps=2", "run.preview_every=0", *FAST]) == 0
    before, after = (load_weights(path / "unet.safetensors")[0] for path in (base, out / "model"))
    assert before.keys() == after.keys()
    assert any(not torch.allclose(before[name], after[name].float(), atol=1e-6) for name in before)
