"""Files of LoRAs: each form there and back, names against excerpts of real files, and every refusal."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save, tensors_of
from torch import Tensor, nn

from ldm.models.clip import TextConfig
from ldm.models.lora import LoRAConfig, add_lora, targeted
from ldm.models.lora_math import Factors
from ldm.models.unet import UNetConfig
from ldm.weights.kinds import find_kind
from ldm.weights.lora import FORMS, LoRAFile, read_lora
from ldm.weights.lora_names import layers, simo_order, spellings, theirs
from ldm.weights.lora_writing import write_lora
from ldm.weights.names import BUILD, Config

UNET = UNetConfig(
    model_channels=16, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(1, 2), context_dim=12,
    num_heads=2, norm_groups=4,
)  # fmt: skip
TEXT = TextConfig(width=12, layers=2, heads=2, mlp_width=16, vocab_size=9, context_length=5)
CONFIGS: dict[str, Config] = {"unet": UNET, "text": TEXT}
SIMO = ("*.attn?.to_*", "*.ff.proj_in")  # what cloneofsimo's files hold
BLOCK = "down_blocks_0_attentions_0_transformer_blocks_0"


def factors(alpha: float | None = 3.0, dtype: torch.dtype = torch.float16, simo: bool = False) -> LoRAFile:
    """Random ones for every usual layer of both parts."""
    config = LoRAConfig(rank=2, alpha=alpha, targets=SIMO if simo else ("transformer", "convolutions"))
    text = LoRAConfig(rank=2, alpha=alpha, targets=("attention",) if simo else ("transformer",))
    parts = {}
    for part, each in (("unet", config), ("text", text)):
        module = BUILD[type(CONFIGS[part])](CONFIGS[part])
        lora = add_lora(module, each, dtype=dtype)
        for adapter in lora.adapters.values():
            nn.init.normal_(adapter.up)
        parts[part] = lora.weights
    return LoRAFile(Path("made.safetensors"), "ldm", parts)


def same(a: LoRAFile, b: LoRAFile) -> bool:
    def plain(file: LoRAFile) -> dict[tuple[str, str], Factors]:
        return {
            (part, layer): each for part, weights in file.parts.items() for layer, each in weights.items()
        }

    x, y = plain(a), plain(b)
    return x.keys() == y.keys() and all(
        torch.equal(x[key].down, y[key].down)
        and torch.equal(x[key].up, y[key].up)
        and (x[key].down.dtype, x[key].alpha) == (y[key].down.dtype, y[key].alpha)
        for key in x
    )


def written(tmp_path: Path, file: LoRAFile, form: str, name: str = "lora") -> Path:
    return write_lora(file, tmp_path / (name if form == "peft" else f"{name}.safetensors"), CONFIGS, form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_round_trip_is_bit_equal(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Alpha and number format included; cloneofsimo's has no alpha."""
    simo = form == "cloneofsimo"
    file = factors(alpha=None if simo else 3.0, dtype=dtype, simo=simo)
    path = written(tmp_path, file, form)
    found = read_lora(path, CONFIGS)
    assert (found.form, found.notes) == (form, ())
    assert same(found, file)
    again = written(tmp_path, found, form, "again")  # and from the file's side: every tensor and name
    inside = [Path("unet/adapter_model.safetensors")] if form == "peft" else [Path()]
    for each in inside:
        before, after = (tensors_of(root / each if form == "peft" else root) for root in (path, again))
        assert before.keys() == after.keys()
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("form", FORMS)
def test_alphas_and_ranks_that_differ_survive(form: str, tmp_path: Path) -> None:
    file = factors(simo=form == "cloneofsimo")
    layer = "mid_block.attention.blocks.0.attn1.to_q"
    file.parts["unet"][layer] = Factors(torch.ones(5, 32), torch.ones(32, 5), 10.0)  # type: ignore[index]
    found = read_lora(written(tmp_path, file, form), CONFIGS)
    for part, weights in file.parts.items():
        for name, each in weights.items():
            back = found.parts[part][name]
            if form == "cloneofsimo":  # alpha is in `up`
                torch.testing.assert_close(back.up, each.up * each.scale)
                assert back.scale == 1
            else:
                assert (back.rank, back.alpha) == (each.rank, each.alpha)


def test_our_files_say_what_they_are_for(tmp_path: Path) -> None:
    """No model is needed to read or convert them; more sections of the header are kept."""
    file = factors()
    path = write_lora(file, tmp_path / "own.safetensors", CONFIGS, metadata={"trained": {"steps": 5}})
    found = read_lora(path)
    assert same(found, file)
    assert found.metadata["trained"] == {"steps": 5}


def test_names_of_kohya_and_diffusers(tmp_path: Path) -> None:
    """Excerpts of real files, and their 264 layers (192 of the UNet, 72 of the text tower)."""
    config = find_kind("sd15").config
    table = spellings({"unet": config.unet, "text": config.text})
    first = "down_blocks.0.attentions.0.blocks.0"
    for name, layer in {
        f"lora_unet_{BLOCK}_attn1_to_q": ("unet", f"{first}.attn1.to_q"),
        f"lora_unet_{BLOCK}_attn2_to_out_0": ("unet", f"{first}.attn2.to_out"),
        f"lora_unet_{BLOCK}_ff_net_0_proj": ("unet", f"{first}.ff.proj_in"),
        f"lora_unet_{BLOCK}_ff_net_2": ("unet", f"{first}.ff.proj_out"),
        "lora_unet_mid_block_attentions_0_proj_in": ("unet", "mid_block.attention.proj_in"),
        "lora_unet_up_blocks_3_attentions_2_proj_out": ("unet", "up_blocks.3.attentions.2.proj_out"),
        "lora_unet_down_blocks_1_resnets_0_conv_shortcut": ("unet", "down_blocks.1.resnets.0.shortcut"),
        "lora_unet_up_blocks_0_upsamplers_0_conv": ("unet", "up_blocks.0.upsample.conv"),
        "lora_te_text_model_encoder_layers_11_mlp_fc2": ("text", "blocks.11.fc2"),
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": ("text", "blocks.0.to_q"),
        "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0": (
            "unet", "mid_block.attention.blocks.0.attn2.to_out",
        ),
        "text_encoder.text_model.encoder.layers.3.self_attn.out_proj": ("text", "blocks.3.to_out"),
        "text_encoder.encoder.layers.3.self_attn.out_proj": ("text", "blocks.3.to_out"),
    }.items():  # fmt: skip
        assert table[name] == layer
    kohya = [name for name in table if name.startswith(("lora_unet_", "lora_te_"))]
    linear = [targeted(BUILD[type(each)](each), ("transformer",)) for each in (UNET, TEXT)]
    assert len(kohya) == len(layers(config.unet)) + len(layers(config.text))
    assert (len(linear[0]), len(linear[1])) == (7 * 12, 2 * 6)


def test_the_order_of_cloneofsimos_layers() -> None:
    """Widths (in, out) of the first block and of the middle one, which is last, in the two real files."""
    config = find_kind("sd15").config
    assert config.unet is not None and config.text is not None
    order, shapes = simo_order("unet", config.unet), layers(config.unet)
    assert (len(order), len(simo_order("text", config.text))) == (144, 48)
    widths = [tuple(reversed(shapes[name])) for name in order]
    block = [(320, 320)] * 4 + [(320, 2560), (320, 320), (768, 320), (768, 320), (320, 320)]
    assert widths[:18] == block * 2
    assert widths[53:62] == [(1280, 1280)] * 5 + [(1280, 10240), (1280, 1280), (768, 1280), (768, 1280)]
    assert widths[135:] == [(4 * a, 4 * b) if a != 768 else (768, 4 * b) for a, b in block]
    assert order[135].startswith("mid_block.")
    assert simo_order("text", config.text)[:4] == [f"blocks.0.to_{x}" for x in ("k", "v", "q", "out")]


def one(role: str = "lora_down") -> dict[str, Tensor]:
    """A kohya file with one layer."""
    name = f"lora_unet_{BLOCK}_attn1_to_q"
    return {f"{name}.lora_down.weight": torch.ones(2, 16), f"{name}.lora_up.weight": torch.ones(16, 2)}


LAYER = "down_blocks.0.attentions.0.blocks.0.attn1.to_q"


def test_without_alpha_the_scale_is_1(tmp_path: Path) -> None:
    found = read_lora(save(tmp_path / "l.safetensors", one()), CONFIGS)
    assert found.parts["unet"][LAYER].scale == 1
    name = f"lora_unet_{BLOCK}_attn1_to_q.alpha"
    found = read_lora(save(tmp_path / "m.safetensors", {**one(), name: torch.tensor(0.5)}), CONFIGS)
    assert found.parts["unet"][LAYER].scale == 0.25


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.{}.weight", False),
        ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.{}.weight", False),
        ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora.{}.weight", False),
        ("text_encoder.text_model.encoder.layers.1.self_attn.to_q_lora.{}.weight", True),
        ("text_encoder.text_model.encoder.layers.1.self_attn.q_proj.lora_linear_layer.{}.weight", True),
    ],
)
def test_diffusers_spellings(name: str, text: bool, tmp_path: Path) -> None:
    width = 12 if text else 16
    tensors = {name.format("down"): torch.ones(2, width), name.format("up"): torch.ones(width, 2)}
    found = read_lora(save(tmp_path / "l.safetensors", tensors), CONFIGS)
    assert list(found.parts) == ["text" if text else "unet"]
    assert list(found.parts["text" if text else "unet"]) == ["blocks.1.to_q" if text else LAYER]


def test_a_list_of_cloneofsimos_by_its_file_name(tmp_path: Path) -> None:
    """up, down, up, down, ... in module order; the text tower's list is a file of its own."""
    file = factors(alpha=None, simo=True)
    for part, name in (("unet", "lora_weight.pt"), ("text", "lora_weight.text_encoder.pt")):
        weights = file.parts[part]
        order = simo_order(part, CONFIGS[part])
        flat = [tensor for layer in order for tensor in (weights[layer].up, weights[layer].down)]
        torch.save(flat, tmp_path / name)
        found = read_lora(tmp_path / name, CONFIGS)
        assert found.form == "cloneofsimo"
        assert same(found, LoRAFile(found.path, "", {part: weights}))
    early = [layer for layer in simo_order("unet", UNET) if not layer.endswith("proj_in")]  # without GEGLU
    flat = [
        tensor for layer in early for tensor in (file.parts["unet"][layer].up, file.parts["unet"][layer].down)
    ]
    torch.save(flat, tmp_path / "early.pt")
    assert sorted(read_lora(tmp_path / "early.pt", CONFIGS).parts["unet"]) == sorted(early)


def test_embeddings_beside_the_layers(tmp_path: Path) -> None:
    file = factors(alpha=None, simo=True)
    file = LoRAFile(file.path, file.form, file.parts, {"<s1>": torch.ones(12)})
    for form in ("cloneofsimo", "ldm"):
        found = read_lora(written(tmp_path, file, form, form), CONFIGS)
        assert torch.equal(found.embeddings["<s1>"], torch.ones(12))
        assert same(found, file)
    with pytest.raises(ValueError, match="kohya holds no embeddings \\(<s1>\\)"):
        written(tmp_path, file, "kohya", "no")


def test_linear_layers_fit_1x1_convolutions_and_back(tmp_path: Path) -> None:
    """Stable Diffusion 1 projects by convolutions, 2 by linear layers."""
    name = "lora_unet_mid_block_attentions_0_proj_in"
    for extra in ((), (1, 1)):
        tensors = {
            f"{name}.lora_down.weight": torch.ones(2, 32, *extra),
            f"{name}.lora_up.weight": torch.ones(32, 2, *extra),
        }
        found = read_lora(save(tmp_path / f"{len(extra)}.safetensors", tensors), CONFIGS)
        assert found.parts["unet"]["mid_block.attention.proj_in"].down.shape == (2, 32, 1, 1)


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("hada_w1_a", "LoHa"), ("lokr_w1", "LoKr"), ("dora_scale", "DoRA"), ("lora_mid.weight", "Tucker"),
        ("oft_blocks", "OFT"), ("on_input", "IA3"), ("a1.weight", "GLoRA"), ("w_norm", "norm"),
        ("diff", "full difference"),
    ],
)  # fmt: skip
def test_other_families_are_named(name: str, family: str, tmp_path: Path) -> None:
    tensors = {**one(), f"lora_unet_{BLOCK}_attn1_to_k.{name}": torch.ones(2, 2)}
    for configs in (CONFIGS, None):
        with pytest.raises(
            ValueError, match=f"l.safetensors holds .*{family}.*which is not read; LoRA and LoCon are"
        ):
            read_lora(save(tmp_path / "l.safetensors", tensors), configs)


def test_unknown_layers_are_counted_and_can_be_left_out(tmp_path: Path) -> None:
    tensors = {**one(), **{name.replace("attn1", "attn7"): tensor for name, tensor in one().items()}}
    path = save(tmp_path / "l.safetensors", tensors)
    with pytest.raises(
        ValueError, match="another model: matched 1 of 2 layers; 1 unknown: lora_unet_down.*attn7_to_q"
    ):
        read_lora(path, CONFIGS)
    found = read_lora(path, CONFIGS, partial=True)
    assert list(found.parts["unet"]) == [LAYER]
    assert "matched 1 of 2 layers" in found.notes[0] and found.notes[0].endswith("left out")


def test_another_base_is_told_with_its_widths(tmp_path: Path) -> None:
    name = f"lora_unet_{BLOCK}_attn2_to_k"
    other = {f"{name}.lora_down.weight": torch.ones(2, 99), f"{name}.lora_up.weight": torch.ones(16, 2)}
    path = save(tmp_path / "l.safetensors", {**one(), **other})
    with pytest.raises(
        ValueError, match=f"matched 1 of 2 layers; 1 of another width: {name} 16x99 for 16x12"
    ):
        read_lora(path, CONFIGS)
    only = save(tmp_path / "m.safetensors", other)
    with pytest.raises(ValueError, match="matched 0 of 1"):
        read_lora(only, CONFIGS, partial=True)  # nothing is left
    file = save(
        tmp_path / "simo.safetensors", {"unet:0:up": torch.ones(16, 2), "unet:0:down": torch.ones(2, 16)}
    )
    with pytest.raises(ValueError, match="numbers 1 layers of its unet, this model has 63"):
        read_lora(file, CONFIGS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"lora_down.weight": torch.ones(0, 16), "lora_up.weight": torch.ones(16, 0)},
            "rank 0 changes nothing",
        ),
        ({"lora_up.weight": torch.ones(16, 3)}, "down has rank 2, up 3"),
        ({"lora_up.weight": None}, "up is missing"),
        ({"lora_down.weight": torch.full((2, 16), float("nan"))}, "NaN"),
        ({"alpha": torch.tensor(float("inf"))}, "infinite"),
        ({"alpha": torch.ones(3)}, "layer lora_unet"),
        ({"surprise": torch.ones(3)}, "surprise besides its LoRA"),
    ],
)
def test_damaged_files(change: dict[str, Tensor | None], message: str, tmp_path: Path) -> None:
    tensors: dict[str, Any] = {**one(), **{f"lora_unet_{BLOCK}_attn1_to_q.{k}": v for k, v in change.items()}}
    path = save(tmp_path / "l.safetensors", {k: v for k, v in tensors.items() if v is not None})
    with pytest.raises(ValueError, match=message) as error:
        read_lora(path, CONFIGS)
    assert "l.safetensors" in str(error.value) and "\n" not in str(error.value)


def test_a_file_without_a_lora(tmp_path: Path) -> None:
    path = save(tmp_path / "model.safetensors", {"conv_in.weight": torch.ones(3, 3)})
    with pytest.raises(ValueError, match="holds no LoRA; its tensors are called conv_in.weight"):
        read_lora(path, CONFIGS)
    with pytest.raises(FileNotFoundError, match="nothing.safetensors does not exist"):
        read_lora(tmp_path / "nothing.safetensors", CONFIGS)
    with pytest.raises(ValueError, match="folder without adapter_model.safetensors"):
        read_lora(tmp_path, CONFIGS)
    small = save(tmp_path / "l.safetensors", one())
    with pytest.raises(ValueError, match="does not tell which model it is for; give it by --model"):
        read_lora(small)


def test_pefts_configuration(tmp_path: Path) -> None:
    path = written(tmp_path, factors(), "peft")
    file = path / "unet" / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "use_rslora": True}))
    scale = read_lora(path, CONFIGS).parts["unet"][LAYER].scale
    assert scale == pytest.approx(3 / 2**0.5)  # alpha / sqrt(rank)
    for change, message in (({"use_dora": True}, "DoRA"), ({"lora_alpha": "x"}, "must be a number")):
        file.write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=message):
            read_lora(path, CONFIGS)
    file.write_text("{")
    with pytest.raises(ValueError, match="no configuration of peft's"):
        read_lora(path, CONFIGS)


def test_what_is_not_written(tmp_path: Path) -> None:
    file = factors()
    (tmp_path / "there.safetensors").write_bytes(b"")
    for name, form, message in (
        ("there.safetensors", "ldm", "exists"),
        ("x.pt", "kohya", "named \\*.safetensors"),
        ("x.safetensors", "onnx", "form must be one of ldm, kohya"),
        ("x.safetensors", "cloneofsimo", "are missing or not among them"),
    ):
        with pytest.raises(ValueError, match=message):
            write_lora(file, tmp_path / name, CONFIGS, form)
    with pytest.raises(ValueError, match="without layers"):
        write_lora({"unet": {}}, tmp_path / "x.safetensors", CONFIGS)
    huge = {"unet": {LAYER: Factors(torch.full((2, 16), 1e6), torch.ones(16, 2), 1.0)}}
    with pytest.raises(ValueError, match="not finite as torch.float16"):
        write_lora(huge, tmp_path / "x.safetensors", CONFIGS, dtype=torch.float16)
    adm = UNetConfig(model_channels=16, channel_mult=(1,), attention="adm", context_dim=None, norm_groups=4)
    fused = {"unet": {"mid_block.attention.qkv": Factors(torch.ones(2, 16, 1), torch.ones(48, 2, 1), 1.0)}}
    with pytest.raises(ValueError, match="qkv is no single layer in that form; write ldm"):
        write_lora(fused, tmp_path / "x.safetensors", {"unet": adm}, "kohya")
    write_lora(fused, tmp_path / "own.safetensors", {"unet": adm})
    assert "mid_block.attention.qkv" not in theirs(adm)
    assert list(tmp_path.glob("x*")) == []
