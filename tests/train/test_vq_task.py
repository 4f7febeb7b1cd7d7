"""The autoencoder task with a codebook: the original's formula, the codes' first step by hand, revival, exact
resuming, a learned log-variance."""

import json

import pytest
import torch
from PIL import Image, ImageDraw
from torch.testing import assert_close

from ldm.config import from_dict
from ldm.models.autoencoder import AutoencoderVQ
from ldm.seeding import generator
from ldm.weights.io import load_weights, read_metadata
from train.loop import train
from train.tasks.autoencoder import AutoencoderTask, AutoencoderTaskConfig

SIZE, START, BETA = 16, 2, 0.25
TABLE = "quantizer.embedding.weight"
ADVERSARIAL = {
    "adversarial_weight": 0.5,
    "adversarial_start": START,
    "discriminator": {"layers": 1, "features": 4},
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Ten pictures of a disc on a plain ground, no two alike."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(10):
        colours = torch.randint(256, (2, 3), generator=torch.Generator().manual_seed(i)).tolist()
        picture = Image.new("RGB", (SIZE, SIZE), tuple(colours[0]))
        ImageDraw.Draw(picture).ellipse((2, i % 4, 9 + i % 5, 11), tuple(colours[1]))
        picture.save(folder / f"{i}.png")
    return folder


def config_of(pictures, out, loss=None, stage=None, **run):
    data = {
        "data": {"path": str(pictures), "size": SIZE, "heldout": 0.2},
        "autoencoder": {
            "base_channels": 8,
            "channel_mult": [1, 2],
            "num_res_blocks": 1,
            "norm_groups": 4,
            "codebook_size": 32,
            **(stage or {}),
        },
        "loss": loss or {},
        "run": {
            "out": str(out),
            "steps": 6,
            "batch": 4,
            "lr": 1e-3,
            "warmup": 0,
            "device": "cpu",
            "preview_every": 0,
            "log_every": 1,
            **run,
        },
    }
    return from_dict(AutoencoderTaskConfig, data)


def task_of(pictures, out, loss=None, stage=None, **run):
    return AutoencoderTask(config_of(pictures, out, loss, stage, **run))


def spread(task):
    """Codes as far apart as latents, so that several are in use."""
    weight = task.model.quantizer.embedding.weight
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(7)))
    return weight


def rows_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def last_state(folder):
    return load_weights(sorted((folder / "states").glob("*.safetensors"))[-1])[0]


def by_hand(task, images, legacy=True):
    """Latents, the nearest code of each place, the codebook loss, and the straight-through reconstruction."""
    z = task.model.encode(images).mean
    table = task.model.quantizer.embedding.weight
    flat = z.permute(0, 2, 3, 1)  # (B, h, w, C)
    indices = torch.cdist(flat.reshape(1, -1, flat.shape[-1]), table[None])[0].argmin(dim=1)
    codes = table[indices].view(flat.shape).permute(0, 3, 1, 2)
    moves_codes, moves_latents = (z.detach() - codes).square().mean(), (codes.detach() - z).square().mean()
    loss = BETA * moves_codes + moves_latents if legacy else moves_codes + BETA * moves_latents
    return z, indices, loss, task.model.decode(z + (codes - z).detach(), quantize=False)


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("terms", [{}, ADVERSARIAL])
def test_the_loss_equals_the_originals_formula(pictures, tmp_path, legacy, terms):
    """`mean(rec) + w codebook + d_w g`: of means, the adaptive weight's limit too, unlike the KL form's sums."""
    task = task_of(pictures, tmp_path, {"legacy": legacy, "codebook_weight": 0.8, **terms})
    spread(task)
    if terms:  # pulls so little that the adaptive weight is large: 10,000 / (16 x 16 x 3) would cut it off
        with torch.no_grad():
            task.discriminator.blocks[-1].weight.mul_(1e-3)
    images = task.batch(START, 0)
    _, indices, codebook, reconstructions = by_hand(task, images, legacy)
    rec = (images - reconstructions).abs().mean()
    expected = rec + 0.8 * codebook
    if terms:
        g, last = -task.discriminator(reconstructions).mean(), task.model.decoder.conv_out.weight
        pull, push = [torch.autograd.grad(term, last, retain_graph=True)[0].norm() for term in (rec, g)]
        factor = (pull / (push + 1e-4)).clamp(0, 1e4).detach()
        assert factor > 20
        expected = expected + 0.5 * factor * g

    ours, values = task.loss(START, 0)
    names = {"l1", "psnr", "codebook", "usage", "perplexity"}
    assert values.keys() == (names | {"adversarial", "adaptive_weight"} if terms else names)
    assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert values["codebook"] == pytest.approx(codebook.item(), rel=1e-4)
    assert values["usage"] == pytest.approx(len(indices.unique()) / 32)
    assert 1 < values["perplexity"] <= len(indices.unique())
    weights = list(task.model.parameters())
    gradients = [torch.autograd.grad(loss, weights) for loss in (ours, expected)]
    for a, b in zip(*gradients, strict=True):
        assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item() + 1e-8)


def test_the_first_step_of_the_codebook_by_hand(pictures, tmp_path):
    """Each used code is drawn to the mean of its latents, by AdamW; the others only decay."""
    lr, decay = 1e-3, 0.1
    task = task_of(pictures, tmp_path / "run", steps=1, lr=lr, weight_decay=decay, clip=1e9)
    table = spread(task).detach().clone()
    with torch.no_grad():
        z, indices, _, _ = by_hand(task, task.batch(0, 0))
    latents, gradient = z.permute(0, 2, 3, 1).reshape(-1, 4), torch.zeros_like(table)
    for latent, k in zip(latents, indices.tolist(), strict=True):
        gradient[k] += 2 * BETA * (table[k] - latent) / latents.numel()
    assert 1 < len(indices.unique()) < 32
    # Adam's first step: both averages are the gradient itself after their correction
    expected = table * (1 - lr * decay) - lr * gradient / (gradient.abs() + 1e-8)
    train(task, False, "")
    assert_close(last_state(tmp_path / "run")[f"weights/model/{TABLE}"], expected, rtol=0, atol=1e-6)


def test_codes_in_equal_use_have_full_perplexity(pictures, tmp_path):
    task = task_of(pictures, tmp_path)
    told = task.of_codes(torch.arange(32).repeat(4).view(2, 8, 8))
    assert told == {"usage": 1.0, "perplexity": pytest.approx(32, rel=1e-5)}
    told = task.of_codes(torch.full((2, 8, 8), 5))
    assert told == {"usage": 1 / 32, "perplexity": pytest.approx(1)}


def test_held_out_pictures_tell_the_use_of_the_codes(pictures, tmp_path):
    task = task_of(pictures, tmp_path)
    spread(task)
    with torch.no_grad():
        values = task.validate()
        _, indices, _, _ = by_hand(task, task.heldout.float() / 127.5 - 1)
    assert values.keys() == {"heldout_psnr", "heldout_usage", "heldout_perplexity"}
    assert values["heldout_usage"] == pytest.approx(len(indices.unique()) / 32)


def test_one_batch_is_learned_by_heart(pictures, tmp_path):
    """Nearly every one of its 128 places ends up with a code of its own."""
    run = {"steps": 120, "batch": 2, "lr": 4e-3, "ema_decay": 0.0, "betas": [0.9, 0.99]}
    out, loss, stage = tmp_path / "run", {"revive_after": 10}, {"codebook_size": 128}
    task = task_of(pictures, out, loss, stage, **run, lr_schedule="cosine", checkpoint_every=0)
    task.images = task.images[:2]
    train(task, False, "")
    rows = [row for row in rows_of(out) if "loss" in row]
    assert rows[0]["l1"] > 0.5 and rows[0]["perplexity"] < 32
    assert rows[-1]["l1"] < 0.07 and rows[-1]["codebook"] < 0.002 and rows[-1]["perplexity"] > 64
    assert sum(row["revived"] for row in rows) > 0


def test_a_code_in_use_is_never_revived(pictures, tmp_path):
    """`revive_after` steps without use make a code dead; it becomes a latent that (seed, step) picks."""
    task = task_of(pictures, tmp_path, {"revive_after": 2})
    table = spread(task)
    before, used = table.detach().clone(), set()
    for step in range(2):
        with torch.no_grad():
            used |= set(by_hand(task, task.batch(step, 0))[1].tolist())
        _, values = task.loss(step, 0)
        assert values["revived"] == 0
    dead = [k for k in range(32) if k not in used]
    with torch.no_grad():
        z = task.model.encode(task.batch(2, 0)).mean.permute(0, 2, 3, 1).reshape(-1, 4)
    places = torch.randperm(len(z), generator=generator(0, "revive", 2))[: len(dead)]
    _, values = task.loss(2, 0)
    assert values["revived"] == len(dead) > 0
    after = table.detach()
    kept = sorted(used)
    assert torch.equal(after[kept], before[kept])
    assert {tuple(row) for row in after[dead].tolist()} == {tuple(row) for row in z[places].tolist()}


def test_the_log_counts_revived_codes_whatever_the_accumulation(pictures, tmp_path):
    counts = []
    for accumulate in (1, 2):
        task = task_of(pictures, tmp_path / str(accumulate), {"revive_after": 1}, accumulate=accumulate)
        task.usage.idle.fill_(1)
        told = [task.loss(0, part)[1].get("revived", 0.0) / accumulate for part in range(accumulate)]
        counts.append(sum(told))
    assert counts == [32, 32]


FULL = {**ADVERSARIAL, "revive_after": 2, "learned_logvar": True}


def test_a_run_with_everything_resumes_bit_for_bit(pictures, tmp_path):
    options = {"steps": 8, "validate_every": 2, "checkpoint_every": 2, "accumulate": 2}
    train(task_of(pictures, tmp_path / "whole", FULL, **options), False, "")
    broken = task_of(pictures, tmp_path / "broken", FULL, **options)

    def unplug(step, part):
        if step == 5:
            raise RuntimeError("the plug was pulled")
        return AutoencoderTask.loss(broken, step, part)

    broken.players["model"].loss = unplug
    with pytest.raises(RuntimeError, match="plug"):
        train(broken, False, "")
    train(task_of(pictures, tmp_path / "broken", FULL, **options), True, "")

    states = [last_state(tmp_path / run) for run in ("whole", "broken")]
    assert states[0].keys() == states[1].keys()
    assert {"weights/model/usage.idle", "weights/model/loss.logvar", "ema/model/loss.logvar"} <= states[
        0
    ].keys()
    assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []
    logs = [[row for row in rows_of(tmp_path / run) if "l1" in row] for run in ("whole", "broken")]
    names = ("loss", "l1", "codebook", "perplexity", "usage", "revived", "logvar", "gradient", "step")
    picked = [[{name: row[name] for name in names} for row in rows] for rows in logs]
    assert picked[0] == picked[1] and len(picked[0]) == 8
    assert sum(row["revived"] for row in picked[0][4:]) > 0  # also after the resume
    # The discriminator's start is counted in steps of the autoencoder, whatever the accumulation
    moved = {name: states[0][f"optimizer/{name}/0/step"].item() for name in ("model", "discriminator")}
    assert moved == {"model": 8, "discriminator": 8 - START}


def test_the_learned_log_variance_moves(pictures, tmp_path):
    """Its first AdamW step by hand, from the gradient 1 - rec / exp(logvar); alone, it changes the names in
    the state and nothing in what is exported."""
    task = task_of(
        pictures,
        tmp_path / "run",
        {"learned_logvar": True, "logvar": 0.5},
        {"codebook_size": None},
        steps=1,
        lr=1e-2,
        weight_decay=0.0,
        clip=1e9,
        ema_decay=0.0,
    )
    with torch.no_grad():
        loss, values = task.loss(0, 0)
    kl = 1e-6 * values["kl"]
    assert loss.item() == pytest.approx(values["l1"] / torch.e**0.5 + 0.5 + kl, rel=1e-5)
    assert values["logvar"] == 0.5
    gradient = 1 - values["l1"] / torch.e**0.5
    train(task, False, "")
    state = last_state(tmp_path / "run")
    expected = 0.5 - 1e-2 * gradient / (abs(gradient) + 1e-8)
    assert state["weights/model/loss.logvar"].item() == pytest.approx(expected, abs=1e-6)
    assert "weights/model/autoencoder.encoder.conv_in.weight" in state
    exported, _ = load_weights(tmp_path / "run" / "model" / "autoencoder.safetensors")
    assert exported.keys() == task.model.state_dict().keys()


def test_without_options_the_state_keeps_its_names(pictures, tmp_path):
    """So that a run of before goes on."""
    for stage in ({}, {"codebook_size": None}):
        task = task_of(pictures, tmp_path, None, stage)
        assert task.players["model"].module is task.model
        assert not isinstance(task.logvar, torch.nn.Parameter)


def test_the_export_has_scale_one(pictures, tmp_path):
    stage = {"scale_factor": 0.3, "shift_factor": 2.0}
    task = task_of(pictures, tmp_path / "run", {"revive_after": 1}, stage, steps=2)
    folder = train(task, False, "")
    config = read_metadata(folder / "autoencoder.safetensors")["config"]
    assert (config["scale_factor"], config["shift_factor"], config["codebook_size"]) == (1.0, 0.0, 32)
    exported, _ = load_weights(folder / "autoencoder.safetensors")
    assert exported.keys() == AutoencoderVQ(task.config.autoencoder).state_dict().keys()


@pytest.mark.parametrize(
    ("loss", "stage", "message"),
    [
        ({"revive_after": 3}, {"codebook_size": None}, "loss.revive_after 3 needs codes"),
        ({"codebook_weight": 0.0}, {}, "loss.codebook_weight must be positive"),
        ({}, {"codebook_size": 0}, "codebook_size must be at least 1, got 0"),
        ({}, {"in_channels": 4}, "autoencoder.in_channels must be 3, for RGB pictures, got 4"),
        ({}, {"channel_mult": [1] * 6}, "data.size 16 is not a multiple of the autoencoder's factor 32"),
    ],
)
def test_impossible_configurations_are_refused(pictures, tmp_path, loss, stage, message):
    with pytest.raises(ValueError, match=message) as error:
        config_of(pictures, tmp_path / "run", loss, stage)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_pictures_too_small_for_lpips_are_refused(pictures, tmp_path):
    data = {"path": str(pictures), "size": 8}
    loss = {"perceptual_weight": 1.0, "perceptual_weights": "some.safetensors"}
    with pytest.raises(ValueError, match="data.size 8 is too small for LPIPS, which needs 16 px"):
        from_dict(AutoencoderTaskConfig, {"data": data, "run": {"out": str(tmp_path)}, "loss": loss})
