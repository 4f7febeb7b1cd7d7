"""Writing checkpoints: round trips bit for bit, diffusers loads what we write and draws the same picture."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoints import save, single_file, tensors_of
from torch import Tensor
from torch.testing import assert_close

from ldm.config import to_dict
from ldm.diffusion.schedule import DiffusionConfig
from ldm.models.tokenizer import Tokenizer, vocabulary
from ldm.models.unet import UNetConfig
from ldm.weights import compvis
from ldm.weights.diffusers_config import diffusion_config, scheduler_json
from ldm.weights.kinds import find_kind
from ldm.weights.reading import open_checkpoint
from ldm.weights.source import Source
from ldm.weights.writing import convert
from sample.pipeline import Pipeline
from sample.weights import main


def whole(kind: str) -> dict[str, Tensor]:
    """A checkpoint with everything a file from the wild holds besides its parts."""
    tensors = single_file(kind, torch.float16)
    tensors |= {"betas": torch.rand(1000), "alphas_cumprod": torch.rand(1000)}
    tensors |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    if kind == "tiny_sd15":
        return tensors | {f"{compvis.TRANSFORMERS_PREFIX}embeddings.position_ids": torch.arange(77)[None]}
    more = {"text_projection": torch.randn(96, 96).half(), "logit_scale": torch.tensor(4.6)}
    return tensors | {compvis.OPENCLIP_PREFIX + name: t for name, t in more.items()}


@pytest.fixture(scope="module", params=["tiny_sd15", "tiny_sd21"])
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("original") / f"{request.param}.safetensors", whole(request.param))


@pytest.mark.parametrize("form", ["ldm", "diffusers", "compvis"])
def test_there_and_back_is_bit_equal(original: Path, tmp_path: Path, form: str) -> None:
    """The parts, and what no part has: schedules, averages' counters, OpenCLIP's projection."""
    there = tmp_path / ("there.safetensors" if form == "compvis" else "there")
    convert(open_checkpoint(original, prediction="v"), there, form)
    back = convert(open_checkpoint(there), tmp_path / "back.safetensors", "compvis")
    assert_close(tensors_of(back), tensors_of(original), rtol=0, atol=0)
    assert open_checkpoint(back).diffusion().prediction == "v"


def test_between_the_two_folders(original: Path, tmp_path: Path) -> None:
    convert(open_checkpoint(original, prediction="eps"), tmp_path / "a", "diffusers")
    convert(open_checkpoint(tmp_path / "a"), tmp_path / "b", "ldm")
    convert(open_checkpoint(tmp_path / "b"), tmp_path / "c", "diffusers")
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) > 10
    for file in files:
        assert (tmp_path / "c" / file).read_bytes() == (tmp_path / "a" / file).read_bytes(), file


def test_number_format_of_choice(original: Path, tmp_path: Path) -> None:
    out = convert(
        open_checkpoint(original, prediction="v"), tmp_path / "m.safetensors", "compvis", torch.bfloat16
    )
    expected, foreign = tensors_of(original), open_checkpoint(original).foreign
    written = tensors_of(out)
    assert written.keys() == expected.keys()
    for name, tensor in written.items():
        wanted = expected[name] if name in foreign else expected[name].bfloat16()
        assert_close(tensor, wanted, rtol=0, atol=0)


def test_the_shipped_model_goes_into_one_file_and_back(tmp_path: Path) -> None:
    """Its form is none of the known kinds: the header of the file says what it is."""
    pipe = Pipeline.load("emoji", device="cpu")
    assert pipe.checkpoint is not None
    file = convert(pipe.checkpoint, tmp_path / "emoji.safetensors", "compvis")
    again = Pipeline.load(file, device="cpu")
    options: dict[str, Any] = {"seed": 3, "steps": 2, "guidance": 3.0}
    prompt = "a red apple, noto emoji"
    assert torch.equal(again.txt2img(prompt, **options), pipe.txt2img(prompt, **options))
    with pytest.raises(ValueError, match="no counterpart in (diffusers|transformers)"):
        convert(pipe.checkpoint, tmp_path / "folder", "diffusers")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["emoji.safetensors"]


# --- diffusers as the judge ---------------------------------------------------------------------------------


def theirs(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    library = pytest.importorskip("diffusers")
    return library.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, local_files_only=True)


def assert_same_picture(folder: Path, ours: Pipeline, pipe: Any) -> None:
    """Guided DDIM steps from the same noise: the same prompt, parts and schedule give the same picture."""
    pipe.set_progress_bar_config(disable=True)
    prompt, negative = ("a red apple (ripe), 2 🍎 & café", "blurry")
    noise = ours.noise(ours.latent_shape(), (5, "image", 0))
    picture = pipe(
        prompt,
        negative_prompt=negative,
        num_inference_steps=4,
        guidance_scale=5.0,
        latents=noise,
        height=128,
        width=128,
        output_type="pt",
    ).images
    mine = ours.txt2img(prompt, negative=negative, seed=5, steps=4, guidance=5.0)
    assert_close((mine + 1) / 2, picture.float().cpu(), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "prediction"), [("tiny_sd15", "eps"), ("tiny_sd21", "v"), ("tiny_sd21", "eps")]
)
def test_diffusers_loads_it_and_draws_the_same_picture(tmp_path: Path, kind: str, prediction: str) -> None:
    file = save(tmp_path / "m.safetensors", single_file(kind))
    folder = convert(open_checkpoint(file, prediction=prediction), tmp_path / "folder", "diffusers")
    pipe = theirs(folder)
    assert_same_picture(folder, Pipeline.load(folder, device="cpu"), pipe)
    assert_same_picture(folder, Pipeline.load(file, device="cpu", prediction=prediction), pipe)


@pytest.mark.parametrize(
    ("channels", "name"),
    [
        (9, "StableDiffusionInpaintPipeline"),
        (5, "StableDiffusionDepth2ImgPipeline"),
        (7, "StableDiffusionUpscalePipeline"),
    ],
)
def test_inpainting_and_depth_models_are_such_in_diffusers_too(
    tmp_path: Path, channels: int, name: str
) -> None:
    """More channels going in; loaded by the class that model_index.json names."""
    library = pytest.importorskip("diffusers")
    kind = find_kind("tiny_sd15").config
    assert kind.unet is not None
    table = {"num_classes": 400} if channels == 7 else {}
    changed = to_dict(replace(kind, unet=replace(kind.unet, in_channels=channels, **table)))
    (tmp_path / "kind.yaml").write_text(yaml.safe_dump(changed))
    tensors = single_file("tiny_sd15", torch.float16)
    tensors[f"{compvis.UNET_PREFIX}input_blocks.0.0.weight"] = torch.randn(32, channels, 3, 3).half()
    if table:
        tensors[f"{compvis.UNET_PREFIX}label_emb.weight"] = torch.randn(400, 128).half()
    file = save(tmp_path / "m.safetensors", tensors)
    checkpoint = open_checkpoint(file, kind=str(tmp_path / "kind.yaml"))
    folder = convert(checkpoint, tmp_path / "folder", "diffusers")
    estimator = {"depth_estimator": None, "feature_extractor": None} if channels == 5 else {}
    pipe = library.DiffusionPipeline.from_pretrained(folder, local_files_only=True, **estimator)
    assert type(pipe) is getattr(library, name)
    weight = pipe.unet.conv_in.weight
    assert torch.equal(weight.half(), tensors[f"{compvis.UNET_PREFIX}input_blocks.0.0.weight"])
    if table:
        assert pipe.low_res_scheduler.config.num_train_timesteps == 1000
        back = open_checkpoint(folder).require("unet")
        assert isinstance(back.config, UNetConfig) and back.config.num_classes == 400


def test_a_flow_is_told_to_diffusers_and_back() -> None:
    library = pytest.importorskip("diffusers")
    config = DiffusionConfig(schedule="flow", prediction="flow", shift=3.0)
    told = scheduler_json(config)
    assert diffusion_config(told, "x") == config
    theirs = getattr(library, told["_class_name"]).from_config(told)
    assert (theirs.config.shift, theirs.config.num_train_timesteps) == (3.0, 1000)
    with pytest.raises(ValueError, match="use_dynamic_shifting"):
        diffusion_config({**told, "use_dynamic_shifting": True}, "x")


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_a_folder_that_diffusers_wrote(tmp_path: Path, safe: bool) -> None:
    """In shards with an index, and as pickles."""
    file = save(tmp_path / "m.safetensors", single_file("tiny_sd15"))
    pipe = theirs(convert(open_checkpoint(file), tmp_path / "ours", "diffusers"))
    pipe.save_pretrained(tmp_path / "theirs", safe_serialization=safe, max_shard_size="10MB")
    assert list((tmp_path / "theirs" / "unet").glob("*.index.json"))
    checkpoint = open_checkpoint(tmp_path / "theirs")
    back = convert(checkpoint, tmp_path / "back.safetensors", "compvis")
    assert_close(tensors_of(back), tensors_of(file), rtol=0, atol=0)


def test_the_tokenizer_that_is_written_is_clips(tmp_path: Path) -> None:
    library = pytest.importorskip("transformers")
    for kind, padding in (("tiny_sd15", "end"), ("tiny_sd21", "zero")):
        file = save(tmp_path / f"{kind}.safetensors", single_file(kind, torch.float16))
        folder = convert(open_checkpoint(file, prediction="v"), tmp_path / kind, "diffusers")
        tokenizer = library.CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        # Stable Diffusion 2 pads with "!", which transformers then reads as padding in a prompt too
        prompts = ["", "a Red apple", "naïve café, 東京 🍎", "x" * 400, "it's 3 o'clock?"]
        options = {"padding": "max_length", "truncation": True, "max_length": 77, "return_tensors": "pt"}
        expected = tokenizer(prompts, **options).input_ids
        assert torch.equal(Tokenizer(77, padding)(prompts), expected)
    ids, merges = vocabulary()
    assert (len(ids), len(merges)) == (49408, 48894)


# --- what is wrong ------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return save(tmp_path / "in" / "m.safetensors", single_file("tiny_sd15", torch.float16))


def no_space(path: Any) -> Any:
    return shutil._ntuple_diskusage(10, 9, 1)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out", "--to", "onnx"], "form must be one of ldm, compvis, diffusers, got 'onnx'"),
        (["out", "--to", "compvis"], "named *.safetensors"),
        (["in", "--to", "ldm"], "exists; give a new name"),
        (["out", "--to", "ldm", "--dtype", "int8"], "number format 'int8' is unknown"),
        (["out", "--to", "ldm", "--kind", "tiny_sd21"], "is not tiny_sd21"),
    ],
)
def test_mistakes_in_the_command(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(["convert", str(source), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_is_told_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", no_space)
    with pytest.raises(ValueError, match=r"needs 3\d MiB, but the disk has 0 MiB left"):
        convert(open_checkpoint(source), tmp_path / "out", "ldm")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("form", ["ldm", "compvis", "diffusers"])
def test_damage_met_half_way_leaves_nothing(tmp_path: Path, form: str) -> None:
    tensors = single_file("tiny_sd15", torch.float16)
    tensors[f"{compvis.TRANSFORMERS_PREFIX}final_layer_norm.bias"][0] = float("inf")
    (tmp_path / "in").mkdir()
    file = save(tmp_path / "in" / "m.safetensors", tensors)
    with pytest.raises(ValueError, match="final_layer_norm.bias"):
        convert(open_checkpoint(file), tmp_path / "out.safetensors", form)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


# --- the command --------------------------------------------------------------------------------------------


def test_inspect(original: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(original)]) == 0
    out = capsys.readouterr().out
    one = "sd15" in original.name
    assert "kind      tiny_sd15" in out if one else "kind      tiny_sd21 or tiny_sd21_base" in out
    assert "predicts  eps" in out if one else "eps or v: not told" in out
    assert "UNet              686 tensors     8,605,284 parameters  float16" in out if one else True
    assert "missing   nothing" in out
    assert f"foreign   {5 if one else 6}: alphas_cumprod, betas" in out


def test_inspect_reads_no_tensor(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object, **__: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(Source, "read", read)
    assert main(["inspect", str(original), "emoji"]) == 0
    out = capsys.readouterr().out
    assert "form      ldm: a model of ours" in out
    assert "predicts  v" in out
    assert main(["inspect", str(tmp_path / "nothing.safetensors")]) == 2
    assert "no shipped name, no file and no folder" in capsys.readouterr().err


def test_a_file_goes_straight_to_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sample.__main__ import main as sample

    file = save(tmp_path / "m.safetensors", single_file("tiny_sd21", torch.float16))
    arguments = ["txt2img", "an apple", "--model", str(file), "--steps", "2", "--out", str(tmp_path / "o")]
    assert sample(arguments) == 2
    assert "--prediction" in capsys.readouterr().err
    assert sample([*arguments, "--prediction", "v"]) == 0
    assert [path.suffix for path in (tmp_path / "o").iterdir()] == [".png"]


def test_the_installed_module_runs() -> None:
    run: Callable[..., Any] = subprocess.run
    done = run([sys.executable, "-m", "sample.weights", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "convert" in done.stdout
