"""A model's folder: what is written comes back, names and folders are found, every fault of a file is named."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import sample
from ldm.diffusion.schedule import DiffusionConfig
from ldm.weights.folder import FILES, weights_hash
from ldm.weights.io import load_weights, save_weights
from ldm.weights.reading import open_checkpoint
from sample import model as model_module
from sample.model import find_model
from sample.pipeline import Pipeline

PROMPTS = ["a red apple", "a blue fish", "", "a red apple"]
PIXEL = 2 / 255  # one step of 8 bits, in [-1, 1]


def states(pipe: Pipeline) -> dict[str, Tensor]:
    parts = {"unet": pipe.unet, "autoencoder": pipe.autoencoder, "text": pipe.text_encoder}
    return {f"{part}.{k}": v for part, m in parts.items() if m is not None for k, v in m.state_dict().items()}


def test_a_round_trip_in_float32_is_bit_equal(pipe: Pipeline, model: Path) -> None:
    loaded = Pipeline.load(model, device="cpu")
    before, after = states(pipe), states(loaded)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert loaded.schedule.config == pipe.schedule.config
    assert loaded.autoencoder.config == pipe.autoencoder.config
    assert torch.equal(loaded.txt2img(PROMPTS, steps=2), pipe.txt2img(PROMPTS, steps=2))
    assert not any(p.requires_grad for p in loaded.unet.parameters())


def test_half_precision_files_change_a_picture_little(pipe: Pipeline, tmp_path: Path) -> None:
    pipe.save(tmp_path)
    tensors, header = load_weights(tmp_path / "unet.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert header["diffusion"]["schedule"] == "scaled_linear"
    loaded = Pipeline.load(tmp_path, device="cpu")
    assert loaded.dtype == torch.float32
    assert_close(loaded.txt2img("a", steps=4), pipe.txt2img("a", steps=4), atol=5 * PIXEL, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_computing_in_half_precision(pipe: Pipeline, model: Path, dtype: torch.dtype) -> None:
    half = Pipeline.load(model, device="cpu", dtype=dtype)
    assert half.dtype == dtype
    images = half.txt2img(PROMPTS, steps=4, guidance=2.0)
    assert images.dtype == torch.float32
    difference = (images - pipe.txt2img(PROMPTS, steps=4, guidance=2.0)).abs().mean()
    assert difference < 0.1  # bfloat16 has 8 bits of mantissa; a wrong picture differs by about 0.4


def test_prediction_and_schedule_travel_with_the_unet(build: Callable[..., Pipeline], tmp_path: Path) -> None:
    config = DiffusionConfig(schedule="cosine", prediction="v", zero_terminal_snr=True, num_timesteps=20)
    build(config).save(tmp_path)
    assert Pipeline.load(tmp_path, device="cpu").schedule.config == config


def test_the_folder_of_a_run_is_its_model(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "run" / "model")
    (tmp_path / "run" / "config.yaml").write_text("")
    assert open_checkpoint(find_model(tmp_path / "run")).path == tmp_path / "run" / "model"


def test_shipped_names(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(model, tmp_path / "models" / "emoji")
    (tmp_path / "emoji").mkdir()
    monkeypatch.setattr(model_module, "SHIPPED", tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    assert find_model("emoji") == tmp_path / "models" / "emoji"
    assert find_model("./emoji/../models/emoji").samefile(tmp_path / "models" / "emoji")
    checkpoint = sample.Pipeline.load(device="cpu").checkpoint
    assert checkpoint is not None
    assert checkpoint.path == tmp_path / "models" / "emoji"
    with pytest.raises(
        FileNotFoundError, match="'emojis' is no shipped name, no file and no folder; did you mean emoji"
    ):
        find_model("emojis")
    with pytest.raises(ValueError, match=r"holds no model: expected unet\.safetensors"):
        Pipeline.load(tmp_path / "emoji")


def test_the_hash_changes_with_the_weights(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "a")
    files, copies = ([folder / name for name in FILES[:3]] for folder in (model, tmp_path / "a"))
    assert weights_hash(copies) == weights_hash(files)
    assert len(weights_hash(files)) == 12
    data = bytearray((tmp_path / "a" / "unet.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "a" / "unet.safetensors").write_bytes(data)
    assert weights_hash(copies) != weights_hash(files)


def rewrite(path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> None:
    tensors, header = load_weights(path)
    change(tensors, header)
    save_weights(path, tensors, header)


def with_nan(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    tensors["conv_in.bias"][0] = torch.nan


def without_config(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    del header["config"]


def without_diffusion(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    del header["diffusion"]


def with_foreign_config(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    header["config"]["target"] = "os.system"


def with_other_width(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    header["config"]["model_channels"] = 32


def without_a_tensor(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    del tensors["conv_out.bias"]


@pytest.mark.parametrize(("change", "message"), [
    (with_nan, "conv_in.bias.*--allow-nan"),
    (without_config, "header has no 'config'"),
    (without_diffusion, "header has no 'diffusion'"),
    (with_foreign_config, "unknown key target"),
    (with_other_width, r"does not fit: .*expected \[32, 4, 3, 3\]"),
    (without_a_tensor, "does not fit: conv_out.bias is missing"),
])  # fmt: skip
def test_faulty_files_are_named(
    model: Path, tmp_path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None], message: str
) -> None:
    folder = shutil.copytree(model, tmp_path / "m")
    rewrite(folder / "unet.safetensors", change)
    with pytest.raises(ValueError, match="unet.safetensors.*" + message) as caught:
        Pipeline.load(folder, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["unet", "autoencoder", "text_encoder"])
def test_missing_truncated_and_swapped_files(model: Path, tmp_path: Path, name: str) -> None:
    path = shutil.copytree(model, tmp_path / "m") / f"{name}.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=rf"{name}.safetensors is truncated"):
        Pipeline.load(tmp_path / "m")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name}.safetensors does not exist"):
        Pipeline.load(tmp_path / "m")
    other = "autoencoder" if name != "autoencoder" else "unet"
    shutil.copy(model / f"{other}.safetensors", path)
    with pytest.raises(ValueError, match=rf"{name}.safetensors: unknown key"):
        Pipeline.load(tmp_path / "m")


def test_one_file_is_one_part(model: Path) -> None:
    with pytest.raises(ValueError, match="unet.safetensors holds no autoencoder, only: unet"):
        Pipeline.load(model / "unet.safetensors")


def test_parts_of_two_models(build: Callable[..., Pipeline]) -> None:
    one, other = build(), build(text=False)
    with pytest.raises(ValueError, match="UNet reads a context of width 16, the text encoder gives None"):
        Pipeline(one.unet, one.autoencoder, None, DiffusionConfig(), device="cpu")
    with pytest.raises(ValueError, match="context of width None, the text encoder gives 16"):
        Pipeline(other.unet, one.autoencoder, one.text_encoder, DiffusionConfig(), device="cpu")


def test_weights_too_large_for_half_precision_are_not_saved(
    build: Callable[..., Pipeline], tmp_path: Path
) -> None:
    large = build(text=False)
    large.unet.conv_in.bias.data[0] = 1e6
    with pytest.raises(ValueError, match=r"unet\.safetensors: conv_in\.bias is not finite as torch\.float16"):
        large.save(tmp_path)
    assert not (tmp_path / "unet.safetensors").exists()
