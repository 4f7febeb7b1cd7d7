"""The autoencoder task with its optional terms: the original's formula, two players, exact resuming."""

import json
import warnings

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from ldm.config import from_dict
from ldm.losses.adversarial import PatchDiscriminator
from ldm.losses.perceptual import LPIPS
from ldm.weights.io import load_weights, save_weights
from train.loop import train
from train.tasks.autoencoder import AutoencoderTask, AutoencoderTaskConfig

SIZE, START = 16, 3


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(10):
        pixels = torch.randint(256, (SIZE, SIZE, 3), generator=torch.Generator().manual_seed(i))
        Image.fromarray(pixels.byte().numpy()).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def lpips_file(tmp_path_factory):
    """A perceptual network with random weights."""
    torch.manual_seed(5)
    network = LPIPS()
    heads = {name: torch.rand_like(value) for name, value in network.state_dict().items() if "heads" in name}
    path = tmp_path_factory.mktemp("lpips") / "random.safetensors"
    save_weights(path, {**network.state_dict(), **heads})
    return path


def task_of(pictures, out, loss=None, **run):
    data = {
        "data": {"path": str(pictures), "size": SIZE, "heldout": 0.2},
        "autoencoder": {"base_channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1, "norm_groups": 4},
        "loss": {"kl_weight": 0.01, **(loss or {})},
        "run": {"out": str(out), "steps": 6, "batch": 4, "lr": 1e-3, "warmup": 2, "device": "cpu", **run},
    }
    return AutoencoderTask(from_dict(AutoencoderTaskConfig, data))


ADVERSARIAL = {
    "adversarial_weight": 0.5,
    "adversarial_start": START,
    "discriminator": {"layers": 1, "features": 4},
}


def test_by_default_the_loss_is_l1_and_kl(pictures, tmp_path):
    task = task_of(pictures, tmp_path)
    assert list(task.players) == ["model"]
    loss, values = task.loss(0, 0)
    assert values.keys() == {"l1", "kl", "psnr"}
    assert loss.item() == pytest.approx(values["l1"] + 0.01 * values["kl"])


@pytest.mark.parametrize("limited", [False, True])
def test_every_term_equals_the_originals_formula(pictures, tmp_path, lpips_file, limited):
    """The original's sums over the values of a picture, written out, are ours times their number."""
    loss = {"perceptual_weight": 0.7, "perceptual_weights": str(lpips_file), **ADVERSARIAL}
    task = task_of(pictures, tmp_path, loss)
    if limited:  # a discriminator that hardly pulls makes the adaptive weight reach its limit of 10,000
        with torch.no_grad():
            task.discriminator.blocks[-1].weight.mul_(1e-6)
    images = task.batch(START, 0)
    reconstructions, posterior = task.reconstruct(images, START, 0)
    per_value = (images - reconstructions).abs() + 0.7 * task.perceptual(images, reconstructions).view(
        -1, 1, 1, 1
    )
    nll = per_value.sum() / len(images)
    kl = posterior.kl().sum() / len(images)
    g = -task.discriminator(reconstructions).mean()
    last = task.model.decoder.conv_out.weight
    norms = [torch.autograd.grad(term, last, retain_graph=True)[0].norm() for term in (nll, g)]
    factor = (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4).detach()
    assert (factor == 1e4) == limited
    expected = nll + 0.01 * kl + 0.5 * factor * g

    ours, values = task.loss(START, 0)
    assert values.keys() == {"l1", "kl", "psnr", "perceptual", "adversarial", "adaptive_weight"}
    assert_close(ours * images[0].numel(), expected, rtol=1e-5, atol=1e-4)
    weights = list(task.model.parameters())
    pairs = zip(torch.autograd.grad(ours, weights), torch.autograd.grad(expected, weights), strict=True)
    for a, b in pairs:
        assert_close(a * images[0].numel(), b, rtol=1e-3, atol=1e-4 * b.abs().max().item())


def test_the_discriminator_waits_for_its_step(pictures, tmp_path):
    task = task_of(pictures, tmp_path, ADVERSARIAL)
    before = {name: value.clone() for name, value in task.discriminator.state_dict().items()}
    _, values = task.loss(START - 1, 0)
    assert "adversarial" not in values
    assert all(torch.equal(before[name], value) for name, value in task.discriminator.state_dict().items())
    assert task.players["discriminator"].starts_at == START
    assert not task.players["discriminator"].averaged


def test_each_player_moves_its_own_weights(pictures, tmp_path):
    task = task_of(pictures, tmp_path, ADVERSARIAL)
    task.loss(START, 0)[0].backward()
    assert all(p.grad is None for p in task.discriminator.parameters())
    assert task.model.decoder.conv_out.weight.grad.abs().max() > 0
    task.model.zero_grad(set_to_none=True)
    loss, values = task.discriminator_loss(START, 0)
    loss.backward()
    assert values.keys() == {"real", "fake"}
    assert all(p.grad is None for p in task.model.parameters())
    assert all(p.grad is not None for p in task.discriminator.parameters())


def test_the_discriminator_sees_the_generators_reconstructions(pictures, tmp_path):
    task = task_of(pictures, tmp_path, ADVERSARIAL)
    seen = []
    task.discriminator.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    task.loss(START, 0)
    task.discriminator_loss(START, 0)
    generated, real, fake = seen
    assert torch.equal(real, task.batch(START, 0))
    assert_close(fake, generated, rtol=0, atol=1e-6)


def log_of(folder):
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "images_per_second"} for row in rows]


def test_a_run_with_a_discriminator_resumes_bit_for_bit(pictures, tmp_path):
    options = {
        "log_every": 1,
        "validate_every": 2,
        "preview_every": 0,
        "checkpoint_every": 2,
        "accumulate": 2,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a user sees no warning of ours
        train(task_of(pictures, tmp_path / "whole", ADVERSARIAL, **options), False, "")
    broken = task_of(pictures, tmp_path / "broken", ADVERSARIAL, **options)

    def unplug(step, part):
        if step == 5:
            raise RuntimeError("the plug was pulled")
        return AutoencoderTask.loss(broken, step, part)

    broken.players["model"].loss = unplug
    with pytest.raises(RuntimeError, match="plug"):
        train(broken, False, "")
    train(task_of(pictures, tmp_path / "broken", ADVERSARIAL, **options), True, "")

    states = [
        load_weights(tmp_path / run / "states" / "step-00000006.safetensors")[0]
        for run in ("whole", "broken")
    ]
    assert states[0].keys() == states[1].keys()
    assert "weights/discriminator/blocks.3.running_mean" in states[0]
    assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "broken")

    rows = {row["step"]: row for row in log_of(tmp_path / "whole") if "loss" in row}
    model = {"step", "loss", "l1", "kl", "psnr", "gradient", "lr"}
    discriminator = {f"discriminator_{name}" for name in ("loss", "real", "fake", "gradient")}
    assert rows[START].keys() == model
    assert rows[START + 1].keys() == model | {"adversarial", "adaptive_weight"} | discriminator
    exported, _ = load_weights(tmp_path / "whole" / "model" / "autoencoder.safetensors")
    assert not [name for name in exported if "discriminator" in name]


def test_the_initial_autoencoder_does_not_depend_on_the_terms(pictures, tmp_path):
    plain, adversarial = task_of(pictures, tmp_path), task_of(pictures, tmp_path, ADVERSARIAL)
    for a, b in zip(plain.model.parameters(), adversarial.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert isinstance(adversarial.players["discriminator"].module, PatchDiscriminator)


def test_pictures_too_small_for_the_discriminator_are_refused_at_once(pictures, tmp_path):
    with pytest.raises(ValueError, match=r"16x16 are too small .* 3 layers, which needs 24 px"):
        task_of(pictures, tmp_path, {"adversarial_weight": 0.5})


def test_a_missing_perceptual_file_is_refused_at_once(pictures, tmp_path):
    loss = {"perceptual_weight": 1.0, "perceptual_weights": str(tmp_path / "none.safetensors")}
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors does not exist"):
        task_of(pictures, tmp_path, loss)


def test_without_held_out_pictures(pictures, tmp_path):
    task = task_of(pictures, tmp_path)
    task.heldout = task.heldout[:0]
    with torch.no_grad():
        assert task.validate() == {}
        task.preview(tmp_path / "preview.png")
    assert (tmp_path / "preview.png").exists()
