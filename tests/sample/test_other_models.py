"""Models other than text-to-image by CLIP, through the public command: VQ first stages, classes, BERT, inpainting."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.bert import BertTextConfig
from ldm.models.class_embedder import ClassEmbedderConfig
from ldm.models.unet import UNetConfig
from ldm.weights import compvis
from ldm.weights.names import BUILD
from sample.__main__ import main
from sample.pipeline import Pipeline

UNET: dict[str, Any] = {
    "model_channels": 16,
    "channel_mult": (1, 2),
    "norm_groups": 8,
    "num_heads": 2,
    "sample_size": 8,
}
VQ = AutoencoderConfig(
    base_channels=8, norm_groups=4, channel_mult=(1, 2), z_channels=3, codebook_size=32, scale_factor=1.0
)
CONDITIONERS = {
    "classes": ClassEmbedderConfig(num_classes=5, dim=12, null_class=4),
    "bert": BertTextConfig(
        vocab_size=30, context_length=9, width=12, layers=2, heads=2, head_channels=6, mlp_width=24
    ),
    "none": None,
}
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "an", "apple", "##s", "red"]


def plain(config: Any) -> dict[str, Any]:
    from ldm.config import to_dict

    return to_dict(config)


@pytest.fixture(params=list(CONDITIONERS))
def model(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, list[str]]:
    """A checkpoint in the original's names of one conditioning, and the options that name it."""
    torch.manual_seed(0)
    conditioner = CONDITIONERS[request.param]
    attention = {"attention": "adm", "context_dim": None} if conditioner is None else {"context_dim": 12}
    configs: dict[str, Any] = {
        "unet": UNetConfig(**UNET, in_channels=3, out_channels=3, **attention),
        "autoencoder": VQ,
    } | ({} if conditioner is None else {request.param: conditioner})
    prefixes = {"unet": compvis.UNET_PREFIX, "autoencoder": compvis.AUTOENCODER_PREFIX}
    tensors = {}
    for name, config in configs.items():
        module = BUILD[type(config)](config)
        for weight in module.parameters():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
        prefix = prefixes.get(name, compvis.CONDITIONER_PREFIX)
        theirs = compvis.to_compvis(module.state_dict(), config)
        tensors |= {prefix + key: tensor.contiguous() for key, tensor in theirs.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    kind = {name: plain(config) for name, config in configs.items()} | {"diffusion": {}}
    (tmp_path / "kind.yaml").write_text(yaml.safe_dump(kind))
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY))
    return request.param, [
        "--model",
        str(tmp_path / "model.safetensors"),
        "--kind",
        str(tmp_path / "kind.yaml"),
    ]


def sample(*arguments: str) -> int:
    return main(["txt2img", *arguments, "--steps", "2", "--device", "cpu"])


def test_pictures_from_the_command(
    model: tuple[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, options = model
    prompts = {"classes": "3", "bert": "an apple", "none": ""}
    out = tmp_path / "out"
    assert sample(prompts[name], *options, "--out", str(out), "--preview", "linear") == 0, (
        capsys.readouterr().err
    )
    assert len(list(out.glob("0*.png"))) == 1
    assert (out / "preview.png").is_file()


def test_the_condition_counts(model: tuple[str, list[str]]) -> None:
    name, options = model
    if name == "none":
        pytest.skip("unconditional")
    pipe = Pipeline.load(options[1], device="cpu", kind=options[3])
    first, second = {"classes": ("3", "2"), "bert": ("an apple", "red apples")}[name]
    one, again, other = (pipe.txt2img(p, steps=2, guidance=3.0) for p in (first, first, second))
    assert torch.equal(one, again)
    assert not torch.allclose(one, other, atol=1e-3)


def test_mistakes(model: tuple[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, options = model
    out = ["--out", str(tmp_path / "out")]
    if name == "classes":
        assert sample("an apple", *options, *out) == 2
        assert "takes a class number 0..4 as prompt, got 'an apple'" in capsys.readouterr().err
        assert sample("7", *options, *out) == 2
        assert "class number 0..4" in capsys.readouterr().err
    elif name == "bert":
        (tmp_path / "vocab.txt").unlink()
        assert sample("an apple", *options, *out) == 2
        assert "vocab.txt does not exist; needed is vocab.txt of bert-base-uncased" in capsys.readouterr().err
    else:
        assert sample("an apple", *options, *out) == 2
        assert "reads no text" in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*"))


def test_a_class_model_without_a_null_class_wants_guidance_1() -> None:
    from ldm.models.class_embedder import ClassEmbedder

    torch.manual_seed(0)
    config = ClassEmbedderConfig(num_classes=5, dim=12)
    unet = UNetConfig(**UNET, in_channels=3, out_channels=3, context_dim=12)
    from ldm.diffusion.schedule import DiffusionConfig

    modules = [BUILD[type(each)](each).eval() for each in (unet, VQ)]
    pipe = Pipeline(*modules, ClassEmbedder(config), DiffusionConfig(), device="cpu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no class that means none"):
        pipe.txt2img("3", steps=2, guidance=3.0)
    assert pipe.txt2img("3", steps=2, guidance=1.0).shape == (1, 3, 16, 16)


def test_an_inpainting_unet_says_what_it_needs(tmp_path: Path) -> None:
    from ldm.diffusion.schedule import DiffusionConfig

    unet = UNetConfig(**UNET, in_channels=8, out_channels=3, attention="adm", context_dim=None)
    modules = [BUILD[type(each)](each).eval() for each in (unet, VQ)]
    pipe = Pipeline(*modules, None, DiffusionConfig(), device="cpu")  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match="reads 5 channels besides its 3 of latents, which no command gives it"
    ):
        pipe.txt2img("", steps=2)
