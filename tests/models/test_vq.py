"""The VQ form of the autoencoder, latents of another width than the bottleneck, and class numbers as a context."""

import pytest
import torch
from formula import original_shapes
from torch import Size
from torch.testing import assert_close

from ldm.losses.autoencoding import reconstruction_loss
from ldm.models.autoencoder import (
    AutoencoderConfig,
    AutoencoderKL,
    AutoencoderVQ,
    PointPosterior,
    make_autoencoder,
)
from ldm.models.class_embedder import ClassEmbedder, ClassEmbedderConfig
from ldm.weights import compvis, diffusers
from ldm.weights.io import load_strict
from ldm.weights.names import shapes

SMALL = {"base_channels": 8, "channel_mult": (1, 2, 2), "norm_groups": 4, "num_res_blocks": 1}
VQ = {**SMALL, "z_channels": 5, "embed_dim": 3, "codebook_size": 32, "scale_factor": 1.0}


def small(**values) -> AutoencoderVQ:
    """With a codebook as wide as the latents are."""
    model = AutoencoderVQ(AutoencoderConfig(**{**VQ, **values})).eval().requires_grad_(False)
    torch.nn.init.normal_(model.quantizer.embedding.weight)
    return model


@pytest.fixture(scope="module")
def autoencoder() -> AutoencoderVQ:
    torch.manual_seed(0)
    return small()


def count(tensors: dict[str, tuple[int, ...]]) -> tuple[int, int]:
    return len(tensors), sum(Size(shape).numel() for shape in tensors.values())


@pytest.mark.parametrize(
    ("values", "tensors", "parameters"),
    [
        ({}, 248, 83_653_863),
        ({"channel_mult": (1, 2, 4)}, 204, 55_325_927),
        ({"channel_mult": (1, 2, 4), "z_channels": 3, "codebook_size": 8192}, 205, 55_322_782),
        ({"channel_mult": (1, 2, 2, 4), "attention_levels": (3,), "codebook_size": 16384}, 299, 67_717_295),
    ],
    ids=["kl-f8", "kl-f4", "vq-f4", "vq-f8"],
)
def test_counts_of_the_released_models(values: dict, tensors: int, parameters: int) -> None:
    config = AutoencoderConfig(**values)
    theirs = original_shapes(config, "")
    assert count(theirs) == (tensors, parameters)
    if config.codebook_size is not None:
        assert theirs["quantize.embedding.weight"] == (config.codebook_size, config.z_channels)
        assert theirs["encoder.conv_out.weight"][0] == config.z_channels
        assert theirs["quant_conv.weight"] == (config.z_channels, config.z_channels, 1, 1)


@pytest.mark.parametrize("codebook", [None, 32])
def test_latents_of_another_width(codebook: int | None) -> None:
    """Quant_conv is [2e, 2z] in the KL form and [e, z] in the VQ form, post_quant_conv [z, e]."""
    config = AutoencoderConfig(**{**VQ, "codebook_size": codebook})
    names = original_shapes(config, "")
    twice = 2 if codebook is None else 1
    assert config.latent_channels == 3
    assert names["encoder.conv_out.weight"][0] == twice * 5
    assert names["quant_conv.weight"] == (twice * 3, twice * 5, 1, 1)
    assert names["post_quant_conv.weight"] == (5, 3, 1, 1)
    model = make_autoencoder(config)
    posterior = model.encode(torch.zeros(1, 3, 8, 8))
    assert posterior.mean.shape == posterior.std.shape == (1, 3, 2, 2)
    assert model.decode(posterior.mode()).shape == (1, 3, 8, 8)


def test_factory() -> None:
    assert AutoencoderConfig().latent_channels == 4
    assert type(make_autoencoder(AutoencoderConfig(**VQ))) is AutoencoderVQ
    assert type(make_autoencoder(AutoencoderConfig(**SMALL))) is AutoencoderKL


def test_encoding_gives_the_latents_before_quantisation(autoencoder: AutoencoderVQ) -> None:
    images = torch.rand(2, 3, 8, 16) * 2 - 1
    posterior = autoencoder.encode(images)
    latents = autoencoder.quant_conv(autoencoder.encoder(images))
    assert isinstance(posterior, PointPosterior)
    assert_close(posterior.mean, latents, rtol=0, atol=0)
    assert_close(posterior.mode(), latents, rtol=0, atol=0)
    assert_close(posterior.sample(torch.randn_like(latents)), latents, rtol=0, atol=0)
    assert_close(posterior.std, torch.zeros_like(latents), rtol=0, atol=0)
    assert_close(autoencoder.encode_latents(images), latents, rtol=0, atol=0)
    assert_close(autoencoder.encode_latents(images, torch.randn_like(latents)), latents, rtol=0, atol=0)


def test_decoding_begins_with_quantisation(autoencoder: AutoencoderVQ) -> None:
    z = torch.randn(2, 3, 2, 4)
    quantized = autoencoder.quantizer(z)
    decoded = autoencoder.decode(z)
    assert_close(decoded, autoencoder.decode(quantized.z_q), rtol=0, atol=0)  # a code is its own nearest
    expected = autoencoder.decoder(autoencoder.post_quant_conv(quantized.z_q))
    assert_close(decoded, expected, rtol=0, atol=0)
    plain = autoencoder.decoder(autoencoder.post_quant_conv(z))
    assert_close(autoencoder.decode(z, quantize=False), plain, rtol=0, atol=0)
    assert float((decoded - plain).abs().max()) > 1e-3
    assert_close(autoencoder.decode_latents(z), decoded, rtol=0, atol=0)


def test_scale_and_shift() -> None:
    model = small(scale_factor=0.5, shift_factor=0.25)
    images = torch.rand(1, 3, 8, 8) * 2 - 1
    latents = model.encode_latents(images)
    assert_close(latents, (model.encode(images).mean - 0.25) * 0.5)
    assert_close(model.scale_latents(model.encode(images).mean), latents)
    assert_close(model.decode_latents(latents), model.decode(model.encode(images).mean), rtol=0, atol=1e-5)


def test_training_pass() -> None:
    """Reconstruction and codes of one pass; either one's loss reaches the encoder, only the codes' the codebook."""
    model = small().requires_grad_(True)
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    reconstructions, quantized = model(images)
    assert_close(reconstructions, model.decode(model.encode(images).mean))
    assert quantized.indices.shape == (2, 2, 2)
    watched = (model.encoder.conv_in.weight, model.quantizer.embedding.weight)
    l1 = reconstruction_loss(images, reconstructions)
    first, codes = torch.autograd.grad(l1, watched, retain_graph=True, allow_unused=True)
    assert float(first.abs().max()) > 1e-6 and codes is None
    for gradient in torch.autograd.grad(quantized.loss.mean(), watched):
        assert float(gradient.abs().max()) > 1e-6


def test_an_image_does_not_depend_on_its_batch(autoencoder: AutoencoderVQ) -> None:
    z = torch.randn(3, 3, 4, 4)
    decoded = autoencoder.decode(z)
    for i in range(3):
        assert_close(decoded[i : i + 1], autoencoder.decode(z[i : i + 1]), rtol=0, atol=1e-5)


def test_errors(autoencoder: AutoencoderVQ) -> None:
    with pytest.raises(ValueError, match="image size 18x16 is not a multiple of the autoencoder's factor 4"):
        autoencoder.encode(torch.zeros(1, 3, 16, 18))
    with pytest.raises(ValueError, match="KL autoencoder has no codebook, got codebook_size 32"):
        AutoencoderKL(AutoencoderConfig(**VQ))
    with pytest.raises(ValueError, match="VQ autoencoder needs a codebook_size, got None"):
        AutoencoderVQ(AutoencoderConfig(**SMALL))
    for name in ("embed_dim", "codebook_size"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            AutoencoderConfig(**{**VQ, name: 0})


@torch.no_grad()
def library_model(attention: bool):
    library = pytest.importorskip("diffusers")
    kind = "Attn" if attention else ""
    theirs = library.VQModel(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D", f"{kind}DownEncoderBlock2D"),
        up_block_types=(f"{kind}UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(16, 32, 32),
        layers_per_block=2,
        latent_channels=4,
        vq_embed_dim=3,
        num_vq_embeddings=64,
        norm_num_groups=8,
    )
    for name, parameter in theirs.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            torch.nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.2)
    return theirs.eval().requires_grad_(False)


LIBRARY = AutoencoderConfig(
    base_channels=16,
    channel_mult=(1, 2, 2),
    norm_groups=8,
    attention_levels=(2,),
    z_channels=4,
    embed_dim=3,
    codebook_size=64,
    scale_factor=1.0,
)


@pytest.mark.parametrize("attention", [False, True])
def test_equals_that_of_diffusers(attention: bool) -> None:
    theirs = library_model(attention)
    config = AutoencoderConfig(**{**vars(LIBRARY), "attention_levels": (2,) if attention else ()})
    ours = AutoencoderVQ(config).requires_grad_(False)
    load_strict(ours, diffusers.to_ours(theirs.state_dict(), config), "diffusers")
    images, z = torch.rand(2, 3, 24, 16) * 2 - 1, torch.randn(2, 3, 6, 4)
    assert_close(ours.encode(images).mean, theirs.encode(images).latents, rtol=0, atol=1e-5)
    assert_close(ours.decode(z), theirs.decode(z).sample, rtol=0, atol=1e-5)
    assert_close(
        ours.decode(z, quantize=False), theirs.decode(z, force_not_quantize=True).sample, rtol=0, atol=1e-5
    )
    reconstructions, quantized = ours(images)
    expected = theirs(images)
    assert_close(reconstructions, expected.sample, rtol=0, atol=1e-5)
    assert_close(quantized.loss.mean(), expected.commit_loss, rtol=1e-5, atol=0)


def test_codebook_is_a_table_in_both_forms() -> None:
    ours = {name: torch.randn(shape) for name, shape in shapes(LIBRARY).items()}
    for theirs in (compvis.to_compvis(ours, LIBRARY), diffusers.to_diffusers(ours, LIBRARY)):
        assert_close(theirs["quantize.embedding.weight"], ours["quantizer.embedding.weight"], rtol=0, atol=0)


def test_class_embedder() -> None:
    embedder = ClassEmbedder(ClassEmbedderConfig(num_classes=5, dim=3))
    context = embedder(torch.tensor([4, 0]))
    assert context.shape == (2, 1, 3)
    assert_close(context[:, 0], embedder.embedding.weight[[4, 0]], rtol=0, atol=0)


@pytest.mark.parametrize("wrong", [-1, 5])
def test_class_embedder_wants_known_classes(wrong: int) -> None:
    with pytest.raises(ValueError, match=rf"class {wrong} is not in 0\.\.4"):
        ClassEmbedder(ClassEmbedderConfig(num_classes=5, dim=3))(torch.tensor([0, wrong]))


@pytest.mark.parametrize("name", ["num_classes", "dim"])
def test_class_embedder_configuration(name: str) -> None:
    with pytest.raises(ValueError, match=f"class embedder {name} must be at least 1, got 0"):
        ClassEmbedderConfig(**{name: 0})


def test_class_embedder_in_the_original_names() -> None:
    """As in the class-conditional ImageNet models, `cond_stage_model.embedding.weight`; diffusers has no such part."""
    config = ClassEmbedderConfig(num_classes=1001)
    assert original_shapes(config, compvis.CONDITIONER_PREFIX) == {
        "cond_stage_model.embedding.weight": (1001, 512)
    }
    ours = {"embedding.weight": torch.randn(1001, 512)}
    back = compvis.to_ours(compvis.to_compvis(ours, config), config)
    assert_close(back, ours, rtol=0, atol=0)
    load_strict(ClassEmbedder(config), back, "the round trip")
    for table in (diffusers.to_ours, diffusers.to_diffusers):
        with pytest.raises(ValueError, match="diffusers has no class embedder"):
            table(ours, config)
