"""Reading a checkpoint of any form: what it is, what it holds, and one clear line where that does not work out."""

from pathlib import Path

import pytest
import torch
import yaml
from checkpoints import save, single_file
from torch import Tensor
from torch.testing import assert_close

from ldm.models.controlnet import ControlNet, ControlNetConfig
from ldm.weights import compvis, diffusers
from ldm.weights.folder import save_part
from ldm.weights.kinds import find_kind
from ldm.weights.reading import open_checkpoint

PARTS = ("unet", "autoencoder", "text")


@pytest.fixture(scope="module")
def sd1() -> dict[str, Tensor]:
    return single_file("tiny_sd15", torch.float16)


@pytest.fixture(scope="module")
def sd2() -> dict[str, Tensor]:
    return single_file("tiny_sd21", torch.float16)


def ours(tensors: dict[str, Tensor], kind: str, part: str) -> dict[str, Tensor]:
    """The part of a single file in our names, without the code under test."""
    config = find_kind(kind).config.parts[part]
    prefixes = {
        "unet": [compvis.UNET_PREFIX],
        "autoencoder": [compvis.AUTOENCODER_PREFIX],
        "text": [compvis.TRANSFORMERS_PREFIX, compvis.OPENCLIP_PREFIX],
    }[part]
    below = {n.removeprefix(p): t for p in prefixes for n, t in tensors.items() if n.startswith(p)}
    return compvis.to_ours(below, config)


def assert_holds(path: Path, tensors: dict[str, Tensor], kind: str = "tiny_sd15", **options: str) -> None:
    """All parts load, in their own number format, with exactly these weights."""
    checkpoint = open_checkpoint(path, **options)
    assert set(checkpoint.parts) == set(PARTS)
    for part in PARTS:
        module = checkpoint.parts[part].load(torch.float16)
        assert_close(module.state_dict(), ours(tensors, kind, part), rtol=0, atol=0)
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())


# --- forms of single files ----------------------------------------------------------------------------------


def test_safetensors(sd1: dict[str, Tensor], tmp_path: Path) -> None:
    file = save(tmp_path / "model.safetensors", sd1)
    checkpoint = open_checkpoint(file)
    assert (checkpoint.form, checkpoint.kind, checkpoint.weights) == ("compvis", "tiny_sd15", "")
    assert checkpoint.foreign == {}
    assert checkpoint.diffusion().prediction == "eps"
    assert_holds(file, sd1)


@pytest.mark.parametrize("wrapped", [True, False], ids=["state_dict", "bare"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_pickles(sd1: dict[str, Tensor], tmp_path: Path, wrapped: bool, zipped: bool) -> None:
    file = tmp_path / "model.ckpt"
    content = {"state_dict": sd1, "global_step": 470_000, "epoch": 1} if wrapped else sd1
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    assert_holds(file, sd1)


def test_schedule_buffers_and_position_ids_are_foreign(sd1: dict[str, Tensor], tmp_path: Path) -> None:
    more = {
        "betas": torch.zeros(1000),
        f"{compvis.TRANSFORMERS_PREFIX}embeddings.position_ids": torch.arange(77)[None],
        "first_stage_model.loss.logvar": torch.zeros(()),
    }
    file = save(tmp_path / "model.safetensors", sd1 | more)
    assert set(open_checkpoint(file).foreign) == set(more)
    assert_holds(file, sd1)


def test_text_names_without_the_prefix_of_old_transformers(sd1: dict[str, Tensor], tmp_path: Path) -> None:
    new = {name.replace(".transformer.text_model.", ".transformer."): t for name, t in sd1.items()}
    assert new.keys() != sd1.keys()
    assert_holds(save(tmp_path / "model.safetensors", new), sd1)


def test_raw_and_averaged_weights(sd1: dict[str, Tensor], tmp_path: Path) -> None:
    """The averaged ones stand under `model_ema.`, dots removed; the original samples Stable Diffusion's raw."""
    prefix = compvis.UNET_PREFIX
    averaged = {
        "model_ema.diffusion_model" + name.removeprefix(prefix).replace(".", ""): t * 2
        for name, t in sd1.items()
        if name.startswith(prefix)
    }
    twice = {name: t * 2 if name.startswith(prefix) else t for name, t in sd1.items()}
    counters = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    file = save(tmp_path / "model.safetensors", sd1 | averaged | counters)
    checkpoint = open_checkpoint(file)
    assert checkpoint.weights == "raw"
    assert "raw and averaged" in checkpoint.notes[0]
    assert set(checkpoint.foreign) == set(averaged) | set(counters)
    assert_holds(file, sd1)
    assert_holds(file, sd1, weights="raw")
    assert_holds(file, twice, weights="ema")
    with pytest.raises(ValueError, match="one set of weights"):
        open_checkpoint(save(tmp_path / "one.safetensors", sd1), weights="ema")


def test_a_part_alone(sd1: dict[str, Tensor], tmp_path: Path) -> None:
    """An autoencoder as people pass it around: with the prefix, or without."""
    prefix = compvis.AUTOENCODER_PREFIX
    bare = {name.removeprefix(prefix): t for name, t in sd1.items() if name.startswith(prefix)}
    full = {prefix + name: t for name, t in bare.items()}
    for name, tensors in (("bare", bare), ("full", full)):
        checkpoint = open_checkpoint(save(tmp_path / f"{name}.safetensors", tensors), kind="tiny_sd15")
        assert list(checkpoint.parts) == ["autoencoder"]
        module = checkpoint.require("autoencoder").load(torch.float16)
        assert_close(module.state_dict(), ours(sd1, "tiny_sd15", "autoencoder"), rtol=0, atol=0)
        with pytest.raises(ValueError, match="holds no UNet, only: autoencoder"):
            checkpoint.require("unet")


def test_scale_factor_of_the_file_wins(tmp_path: Path) -> None:
    tensors = single_file("tiny_sd15", torch.float16) | {"scale_factor": torch.tensor(0.25)}
    config = open_checkpoint(save(tmp_path / "m.safetensors", tensors)).config
    assert config.autoencoder is not None
    assert config.autoencoder.scale_factor == 0.25


# --- Stable Diffusion 2 -------------------------------------------------------------------------------------


def test_eps_or_v_is_asked_for_and_never_guessed(sd2: dict[str, Tensor], tmp_path: Path) -> None:
    file = save(tmp_path / "model.safetensors", sd2)
    checkpoint = open_checkpoint(file)
    assert checkpoint.kind == "tiny_sd21 or tiny_sd21_base"
    with pytest.raises(ValueError, match="do not tell whether the network predicts eps or v.*--prediction"):
        checkpoint.diffusion()
    for prediction in ("eps", "v"):
        assert open_checkpoint(file, prediction=prediction).diffusion().prediction == prediction
    assert open_checkpoint(file, kind="tiny_sd21_base").diffusion().prediction == "eps"


@pytest.mark.parametrize(("word", "prediction"), [("v", "v"), ("eps", "eps"), (None, "eps")])
def test_the_originals_yaml_beside_the_file_tells(
    sd2: dict[str, Tensor], tmp_path: Path, word: str | None, prediction: str
) -> None:
    params = {"target": "os.system", "parameterization": word} if word else {"target": "os.system"}
    (tmp_path / "model.yaml").write_text(yaml.safe_dump({"model": {"params": params}}))
    checkpoint = open_checkpoint(save(tmp_path / "model.safetensors", sd2))
    assert checkpoint.diffusion().prediction == prediction


def test_the_header_tells(sd2: dict[str, Tensor], tmp_path: Path) -> None:
    file = save(tmp_path / "m.safetensors", sd2, {"modelspec.prediction_type": "v"})
    assert open_checkpoint(file).diffusion().prediction == "v"
    file = save(tmp_path / "m2.safetensors", sd2, {"modelspec.prediction_type": "flow"})
    with pytest.raises(ValueError, match="prediction 'flow' is not known"):
        open_checkpoint(file)


def test_a_malformed_yaml_beside_the_file_is_told(sd2: dict[str, Tensor], tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match=r"model.yaml: expected the original's form"):
        open_checkpoint(save(tmp_path / "model.safetensors", sd2))


def test_openclip_tower_with_and_without_the_layer_that_is_not_read(
    sd2: dict[str, Tensor], tmp_path: Path
) -> None:
    whole = open_checkpoint(save(tmp_path / "whole.safetensors", sd2)).config.text
    assert whole is not None
    assert (whole.layers, whole.skip_layers) == (4, 1)
    short = {name: t for name, t in sd2.items() if ".resblocks.3." not in name}
    projection = {
        f"{compvis.OPENCLIP_PREFIX}text_projection": torch.eye(96),
        f"{compvis.OPENCLIP_PREFIX}logit_scale": torch.tensor(1.0),
    }
    paths = [save(tmp_path / "w.safetensors", sd2 | projection), save(tmp_path / "s.safetensors", short)]
    ids = torch.randint(0, 49408, (2, 77))
    outputs = []
    for path in paths:
        checkpoint = open_checkpoint(path)
        outputs.append(checkpoint.require("text").load(torch.float32)(ids))
    assert set(open_checkpoint(paths[0]).foreign) == set(projection)
    text = open_checkpoint(paths[1]).config.text
    assert text is not None
    assert (text.layers, text.skip_layers, text.padding) == (3, 0, "zero")
    assert_close(outputs[0], outputs[1], rtol=0, atol=0)


# --- what is wrong ------------------------------------------------------------------------------------------


def test_another_model_than_the_one_that_was_named(sd2: dict[str, Tensor], tmp_path: Path) -> None:
    """FAULTS row 4: right keys, wrong shapes: the first five misfits, and whose shapes these are."""
    file = save(tmp_path / "model.safetensors", sd2)
    with pytest.raises(ValueError, match="is not tiny_sd15: ") as error:
        open_checkpoint(file, kind="tiny_sd15")
    assert "its shapes are those of tiny_sd21 or tiny_sd21_base" in str(error.value)
    assert str(error.value).count(", expected [") == 5


def test_a_controlnet_in_our_own_folder_and_alone(tmp_path: Path) -> None:
    module = ControlNet(ControlNetConfig(unet=find_kind("tiny_sd15").config.unet))
    save_part(tmp_path / "controlnet.safetensors", module, torch.float16)
    loaded = open_checkpoint(tmp_path).require("control").load(torch.float16)
    expected = {name: t.half() for name, t in module.state_dict().items()}
    assert_close(loaded.state_dict(), expected, rtol=0, atol=0)
    alone = open_checkpoint(tmp_path / "controlnet.safetensors")
    assert list(alone.parts) == ["control"]


def test_missing_and_extra_tensors(sd1: dict[str, Tensor], tmp_path: Path) -> None:
    """FAULTS row 5."""
    name = f"{compvis.UNET_PREFIX}out.2.bias"
    changed = {n: t for n, t in sd1.items() if n != name} | {
        f"{compvis.UNET_PREFIX}out.3.bias": torch.zeros(4)
    }
    with pytest.raises(
        ValueError, match="most like tiny_sd15.*conv_out.bias is missing.*out.3.bias is unexpected"
    ):
        open_checkpoint(save(tmp_path / "model.safetensors", changed))


def test_quantised_weights_are_refused_by_name(sd1: dict[str, Tensor], tmp_path: Path) -> None:
    name = f"{compvis.UNET_PREFIX}out.2.weight"
    file = save(tmp_path / "m.safetensors", sd1 | {name: torch.zeros(4, 32, 3, 3, dtype=torch.int8)})
    with pytest.raises(ValueError, match="out.2.weight is int8, but weights are floating-point"):
        open_checkpoint(file).require("unet").load()


def test_nan_is_refused_by_name_unless_allowed(sd1: dict[str, Tensor], tmp_path: Path) -> None:
    """FAULTS row 6."""
    name = f"{compvis.UNET_PREFIX}out.2.bias"
    file = save(tmp_path / "m.safetensors", sd1 | {name: torch.tensor([0, float("nan"), 0, 0]).half()})
    part = open_checkpoint(file).require("unet")
    with pytest.raises(ValueError, match=f"1 tensor.* {name}.*--allow-nan"):
        part.load()
    with pytest.warns(UserWarning, match="1 tensor"):
        part.load(allow_nan=True)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("conditioner.embedders.1.model.ln_final.weight", "Stable Diffusion XL"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "Stable Diffusion 3"),
        ("double_blocks.0.img_attn.qkv.weight", "Flux"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight", "LoRA"),
    ],
)
def test_models_that_are_not_supported_are_named(tmp_path: Path, name: str, what: str) -> None:
    file = save(tmp_path / "model.safetensors", {name: torch.zeros(2, 2)})
    with pytest.raises(ValueError, match=f"{what}.*"):
        open_checkpoint(file)


def test_keys_of_another_architecture(tmp_path: Path) -> None:
    file = save(tmp_path / "model.safetensors", {"layer1.0.conv1.weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="holds no part of a latent diffusion model; its tensors are layer1"):
        open_checkpoint(file)


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no model: expected unet.safetensors.*model_index.json"):
        open_checkpoint(tmp_path)
    loop = tmp_path / "loop.safetensors"
    loop.symlink_to(loop)
    with pytest.raises((ValueError, OSError), match=r"\A[^\n]*loop.safetensors[^\n]*\Z"):
        open_checkpoint(loop)
    with pytest.raises(ValueError, match="prediction must be one of"):
        open_checkpoint(tmp_path, prediction="score")
    with pytest.raises(ValueError, match="weights must be one of"):
        open_checkpoint(tmp_path, weights="best")


# --- ControlNet ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["full", "pruned", "bare"])
def test_controlnet_files(sd1: dict[str, Tensor], tmp_path: Path, form: str) -> None:
    """Full files hold the base model too; pruned ones the ControlNet alone, with or without its prefix."""
    config = ControlNetConfig(unet=find_kind("tiny_sd15").config.unet)
    weights = {name: torch.randn_like(t) for name, t in ControlNet(config).state_dict().items()}
    theirs = compvis.to_compvis(weights, config)
    prefix = "" if form == "bare" else compvis.CONTROL_PREFIX
    tensors = {prefix + name: t for name, t in theirs.items()} | (sd1 if form == "full" else {})
    file = tmp_path / "kind.yaml"
    parts = "unet: {u}\nautoencoder: {a}\ntext: {t}\n" if form == "full" else ""
    kind = find_kind("tiny_sd15").config
    assert kind.unet is not None
    unet = "{model_channels: 32, context_dim: 64, sample_size: 16}"
    file.write_text(
        f"control: {{unet: {unet}}}\n"
        + parts.format(u=unet, a="{base_channels: 32}", t="{width: 64, layers: 4, heads: 4, mlp_width: 256}")
    )
    checkpoint = open_checkpoint(save(tmp_path / "c.safetensors", tensors), kind=str(file))
    assert set(checkpoint.parts) == ({"control", *PARTS} if form == "full" else {"control"})
    assert_close(checkpoint.require("control").load().state_dict(), weights, rtol=0, atol=0)


def test_full_size_controlnets_are_recognised_alone_and_with_their_base() -> None:
    from checkpoints import empty_single_file

    from ldm.weights.kinds import recognise

    for name in ("controlnet_sd15", "controlnet_sd21"):
        config = find_kind(name).config
        for parts in (("control",), ("control", *PARTS)):
            found = {}
            for part in parts:
                prefixes = [compvis.CONTROL_PREFIX, compvis.UNET_PREFIX, compvis.AUTOENCODER_PREFIX]
                prefixes += [compvis.TRANSFORMERS_PREFIX, compvis.OPENCLIP_PREFIX]
                found[part] = {
                    key.removeprefix(prefix): tensor.shape
                    for key, tensor in empty_single_file(config, (part,)).items()
                    for prefix in prefixes
                    if key.startswith(prefix)
                }
            assert [kind.name for kind in recognise(found, "the file")] == [name]


def test_parts_alone_in_diffusers_names(sd1: dict[str, Tensor], tmp_path: Path) -> None:
    """Without the config.json that stands beside them in a folder."""
    for part in ("unet", "autoencoder"):
        config = find_kind("tiny_sd15").config.parts[part]
        theirs = diffusers.to_diffusers(ours(sd1, "tiny_sd15", part), config)
        file = save(tmp_path / f"{part}.safetensors", theirs)
        checkpoint = open_checkpoint(file, kind="tiny_sd15")
        assert (checkpoint.form, list(checkpoint.parts)) == ("diffusers", [part])
        loaded = checkpoint.require(part).load(torch.float16)
        assert_close(loaded.state_dict(), ours(sd1, "tiny_sd15", part), rtol=0, atol=0)


def test_diffusers_names_of_a_controlnet(tmp_path: Path) -> None:
    import json

    from ldm.weights.diffusers_controlnet import controlnet_json

    config = ControlNetConfig(unet=find_kind("tiny_sd15").config.unet)
    weights = {name: torch.randn_like(t) for name, t in ControlNet(config).state_dict().items()}
    save(tmp_path / "diffusion_pytorch_model.safetensors", diffusers.to_diffusers(weights, config))
    (tmp_path / "config.json").write_text(json.dumps(controlnet_json(config)))
    checkpoint = open_checkpoint(tmp_path)
    assert_close(checkpoint.require("control").load().state_dict(), weights, rtol=0, atol=0)
