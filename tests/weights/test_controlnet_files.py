"""ControlNets of everyone: each form read and written bit for bit, with outputs equal to diffusers'."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save, single_file, tensors_of
from formula import filled, named_input
from torch import Tensor
from torch.testing import assert_close

from ldm.models.controlnet import ControlNet, ControlNetConfig, scale_residuals
from ldm.models.unet import UNet, UNetConfig
from ldm.weights import compvis, diffusers
from ldm.weights.controlnet import load_controlnet
from ldm.weights.diffusers_controlnet import controlnet_config, controlnet_json
from ldm.weights.folder import save_part
from ldm.weights.kinds import find_kind
from ldm.weights.names import shapes
from ldm.weights.reading import open_checkpoint
from ldm.weights.writing import convert
from sample.weights import main

KIND = "tiny_controlnet_sd15"
CONFIG = find_kind(KIND).config.control
SOURCES = ("full.safetensors", "full.pth", "pruned.pth", "bare.safetensors", "diffusers", "ours", "alone")


@pytest.fixture(scope="module")
def full() -> dict[str, Tensor]:
    """A base model with its ControlNet, as the original ships them: half precision, schedule beside."""
    return single_file(KIND, torch.float16) | {"betas": torch.rand(1000)}


@pytest.fixture(scope="module")
def weights(full: dict[str, Tensor]) -> dict[str, Tensor]:
    return compvis.to_ours(compvis.part(full, compvis.CONTROL_PREFIX), CONFIG)


def written(name: str, full: dict[str, Tensor], weights: dict[str, Tensor], folder: Path) -> Path:
    """The same ControlNet in one of the forms it is found in."""
    path = folder / name
    control = {key: t for key, t in full.items() if key.startswith(compvis.CONTROL_PREFIX)}
    if name in ("ours", "alone"):
        module = ControlNet(CONFIG).half()
        module.load_state_dict(weights)
        save_part(path / "controlnet.safetensors", module, torch.float16)
        return path if name == "ours" else path / "controlnet.safetensors"
    if name == "diffusers":
        path.mkdir()
        save(path / "diffusion_pytorch_model.safetensors", diffusers.to_diffusers(weights, CONFIG))
        (path / "config.json").write_text(json.dumps(controlnet_json(CONFIG)))
        return path
    form, suffix = name.split(".")
    bare = {key.removeprefix(compvis.CONTROL_PREFIX): t for key, t in control.items()}
    tensors = {"full": full, "pruned": control, "bare": bare}[form]
    if suffix == "safetensors":
        return save(path, tensors)
    torch.save(tensors if form == "full" else {"state_dict": tensors}, path)
    return path


@pytest.mark.parametrize("name", SOURCES)
def test_every_form_is_read_and_written(
    name: str, full: dict[str, Tensor], weights: dict[str, Tensor], tmp_path: Path
) -> None:
    source = written(name, full, weights, tmp_path)
    loaded = load_controlnet(source, dtype=torch.float16)
    assert (loaded.config.hint_widths, loaded.training) == (CONFIG.hint_widths, False)
    assert_close(loaded.state_dict(), weights, rtol=0, atol=0)
    there = source
    for form in ("diffusers", "ldm", "compvis") if name != "full.pth" else ("compvis",):
        suffix = ".safetensors" if form == "compvis" else ""
        there = convert(open_checkpoint(there), tmp_path / f"as {form}{suffix}", form)
    alone = {key: t for key, t in full.items() if key.startswith(compvis.CONTROL_PREFIX)}
    assert_close(tensors_of(there), full if name.startswith("full") else alone, rtol=0, atol=0)


def test_inspect_says_what_it_steers(
    full: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(save(tmp_path / "c.safetensors", full))]) == 0
    out = capsys.readouterr().out
    assert f"kind      {KIND}" in out
    assert "  ControlNet        340 tensors" in out
    assert "a UNet 32 wide with context 64, by hints of 3 channels and 8x8 pixels a latent" in out
    assert "missing   nothing\n" in out
    assert "foreign   1: betas" in out


def test_a_controlnet_of_our_own_base(tmp_path: Path) -> None:
    """Another plan than Stable Diffusion's: pooled context, scale and shift, factor 4, in our form and the
    original's names; diffusers has no form for it."""
    unet = UNet(
        UNetConfig(
            model_channels=32,
            channel_mult=(1, 2, 3),
            num_res_blocks=1,
            attention_resolutions=(2, 4),
            context_dim=16,
            head_channels=16,
            pooled_context=True,
            scale_shift_norm=True,
        )
    )
    controlnet = ControlNet.from_unet(unet, hint_channels=1, hint_widths=(4, 6, 8))
    save_part(tmp_path / "run" / "model" / "controlnet.safetensors", controlnet, torch.float32)
    file = convert(open_checkpoint(tmp_path / "run"), tmp_path / "c.safetensors", "compvis")
    folder = convert(open_checkpoint(file), tmp_path / "back", "ldm")
    for path in (tmp_path / "run", file, folder, folder / "controlnet.safetensors"):
        loaded = load_controlnet(path)
        assert loaded.config == controlnet.config
        assert_close(loaded.state_dict(), controlnet.state_dict(), rtol=0, atol=0)
    with pytest.raises(ValueError, match="pooled_context has no counterpart in diffusers"):
        convert(open_checkpoint(file), tmp_path / "theirs", "diffusers")
    assert not (tmp_path / "theirs").exists()


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    base = save(tmp_path / "base.safetensors", single_file("tiny_sd15", parts=("unet",)))
    with pytest.raises(ValueError, match=r"base.safetensors holds no ControlNet, only: unet"):
        load_controlnet(base)
    for name, what in {
        "difference": "ControlNet stored as its difference to a base model",
        "lora_controlnet": "Control-LoRA",
        "controlnet_blocks.0.weight": "ControlNet of Stable Diffusion 3 or Flux",
        "add_embedding.linear_1.weight": "network of Stable Diffusion XL",
        "adapter.body.0.block1.weight": "T2I adapter",
    }.items():
        with pytest.raises(ValueError, match=what):
            load_controlnet(save(tmp_path / "c.safetensors", {name: torch.zeros(2)}))


# --- what diffusers writes ----------------------------------------------------------------------------------

# As its hub has them, without what has its usual value
CANNY = {
    "_class_name": "ControlNetModel",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "class_embed_type": None,
    "conditioning_embedding_out_channels": [16, 32, 96, 256],
    "controlnet_conditioning_channel_order": "rgb",
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "projection_class_embeddings_input_dim": None,
    "upcast_attention": False,
    "use_linear_projection": False,
}
SECOND = {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True}


@pytest.mark.parametrize(
    ("more", "kind", "parameters"),
    [({}, "controlnet_sd15", 361_279_120), (SECOND, "controlnet_sd21", 364_228_240)],
)
def test_the_real_ones_have_diffusers_names_and_shapes(
    more: dict[str, Any], kind: str, parameters: int
) -> None:
    """Without memory for their weights. The original's names: test_compvis.py."""
    library = pytest.importorskip("diffusers")
    config = controlnet_config(CANNY | more, "config.json")
    assert shapes(config) == shapes(find_kind(kind).config.control)
    with torch.device("meta"):
        theirs = library.ControlNetModel.from_config(CANNY | more).state_dict()
    ours = {name: torch.empty(shape, device="meta") for name, shape in shapes(config).items()}
    renamed = diffusers.to_diffusers(ours, config)
    assert {name: t.shape for name, t in renamed.items()} == {name: t.shape for name, t in theirs.items()}
    assert (len(renamed), sum(t.numel() for t in renamed.values())) == (340, parameters)
    assert controlnet_config(controlnet_json(config), "ours") == config


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"controlnet_conditioning_channel_order": "bgr"}, "channel_order is 'bgr', only 'rgb'"),
        ({"class_embed_type": "timestep"}, "class_embed_type 'timestep' has no counterpart"),
        ({"class_embed_type": "identity"}, "class_embed_type 'identity' has no counterpart"),
        ({"addition_embed_type": "text_time"}, "addition_embed_type is 'text_time'"),
        ({"encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim_type is 'text_proj'"),
        ({"mid_block_type": "UNetMidBlock2D"}, "mid_block_type is 'UNetMidBlock2D'"),
        ({"norm_eps": 1e-6}, "norm_eps is 1e-06"),
        ({"only_cross_attention": True}, "middle block without self-attention"),
        ({"transformer_layers_per_block": [1, 2, 10, 1]}, "differs between levels"),
        ({"_class_name": "ControlNetUnionModel"}, "a ControlNetUnionModel is no part that is known"),
    ],
)
def test_a_folder_that_asks_for_more_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: dict[str, Any], message: str
) -> None:
    save(tmp_path / "diffusion_pytorch_model.safetensors", {"conv_in.bias": torch.zeros(2)})
    (tmp_path / "config.json").write_text(json.dumps(CANNY | changed))
    assert main(["inspect", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_pipeline_of_diffusers_with_its_controlnet(
    full: dict[str, Tensor], weights: dict[str, Tensor], tmp_path: Path
) -> None:
    """A full file becomes the pipeline that diffusers has for it."""
    library = pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    file = save(tmp_path / "full.safetensors", full)
    folder = convert(open_checkpoint(file), tmp_path / "folder", "diffusers")
    pipe = library.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    assert type(pipe).__name__ == "StableDiffusionControlNetPipeline"
    expected = diffusers.to_diffusers(weights, CONFIG)
    assert_close(pipe.controlnet.half().state_dict(), expected, rtol=0, atol=0)


# --- equal outputs ------------------------------------------------------------------------------------------


def steered_by_both(
    net: ControlNet, their_net: Any, unet: UNet, their_unet: Any, side: int, context_dim: int
) -> tuple[float, float]:
    """Largest error of a residual and of the steered output, each relative to the largest value."""
    x, t = named_input("x", 1, 4, side, side), torch.tensor([981])
    context = named_input("context", 1, 77, context_dim)
    hint = named_input("hint", 1, 3, net.config.stride * side, net.config.stride * side).sigmoid()
    control = net(x, t, context, net.encode_hint(hint))
    down, middle = their_net(x, t, context, hint, return_dict=False)
    residuals = max(error(a, b) for a, b in zip(control, [*down, middle], strict=True))
    steered = unet(x, t, context, control=scale_residuals(control, 1))
    more = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
    expected = their_unet(x, t, context, return_dict=False, **more)[0]
    assert error(unet(x, t, context), expected) > 1e-2, "the control must count"
    return residuals, error(steered, expected)


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def pairs(control: ControlNetConfig, folder: Path) -> tuple[ControlNet, Any, UNet, Any]:
    """ControlNet and UNet, ours and theirs: written by diffusers, read by us from its folders."""
    import diffusers as library

    from ldm.weights.diffusers_config import unet_json

    found: list[Any] = []
    for config, prefix, data in (
        (control, compvis.CONTROL_PREFIX, controlnet_json(control)),
        (control.unet, compvis.UNET_PREFIX, unet_json(control.unet)),
    ):
        name = data.pop("_class_name")
        with torch.device("meta"):
            theirs = getattr(library, name).from_config(data)
        theirs.load_state_dict(diffusers.to_diffusers(filled(config, prefix), config), assign=True)
        theirs.save_pretrained(folder / name)
        found += [theirs.eval()]
    unet = open_checkpoint(folder / "UNet2DConditionModel").require("unet").load()
    return load_controlnet(folder / "ControlNetModel"), found[0], unet, found[1]


@torch.inference_mode()
def test_tiny_outputs_are_those_of_diffusers(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    assert max(steered_by_both(*pairs(CONFIG, tmp_path), side=8, context_dim=64)) < 2e-5


@pytest.mark.slow
@torch.inference_mode()
def test_full_size_outputs_are_those_of_diffusers(tmp_path: Path) -> None:
    """Stable Diffusion 1.5's, steered UNet included: 5 GB on disk, some more in memory."""
    pytest.importorskip("diffusers")
    start = time.perf_counter()
    residuals, steered = steered_by_both(*pairs(ControlNetConfig(), tmp_path), side=32, context_dim=768)
    print(f"residuals {residuals:.1e}, steered UNet {steered:.1e}, {time.perf_counter() - start:.0f} s")
    assert max(residuals, steered) < 1e-4
