"""What every task must be able to do: learn one batch by heart. And what every weighting of the loss must do:
move the weights as its formula says, here written out by hand down to the optimiser.

The first stage with a codebook and the models that read pictures learn theirs in `test_vq_task.py` and
`test_concat.py`.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from coloured import write_rows, write_small_stage
from PIL import Image
from torch import nn

from ldm.config import from_dict, load_config
from ldm.models.unet import UNet
from ldm.seeding import generator
from ldm.weights.io import load_weights
from train.data import batch_indices
from train.loop import train
from train.tasks.autoencoder import AutoencoderTask, AutoencoderTaskConfig
from train.tasks.diffusion import DiffusionTask, DiffusionTaskConfig

TINY = "configs/train/tiny.yaml"
SMALL = [
    "run.device=cpu",
    "run.batch=4",
    "data.size=16",
    "unet.model_channels=16",
    "unet.channel_mult=[1]",
    "unet.attention_resolutions=[1]",
    "unet.norm_groups=4",
    "preview.prompts=[]",
    "diffusion.prediction=eps",
]
READS = {
    "nothing": ["text=null", "unet.context_dim=null", "caption_dropout=0"],
    "classes": ["text=null", "classes.num_classes=4", "classes.dim=32", "classes.null_class=3"],
    "captions": ["text.layers=1"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Pictures of nearly one colour each with captions and classes, and a first stage of random weights, f2."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    rows = []
    for number in range(6):
        pixels = (rng.integers(0, 200, 3) + rng.integers(0, 9, (16, 16, 3))).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        split = "heldout_image" if number == 5 else "train"
        row = {"file_name": f"{number}.png", "text": f"colour {number}", "label": number % 3, "split": split}
        rows.append(row)
    write_rows(folder, rows)
    write_small_stage(folder)
    return folder


def task_of(folder: Path, out: Path, *more: str) -> DiffusionTask:
    made = [f"data.path={folder}", f"autoencoder={folder / 'autoencoder.safetensors'}", f"run.out={out}"]
    return DiffusionTask(load_config(DiffusionTaskConfig, TINY, [*made, *SMALL, *more]))


def learned(task, steps: int, lr: float) -> list[float]:
    """The losses of one batch, always with the same draws, under Adam with a falling rate."""
    player = task.players["model"]
    optimizer = torch.optim.Adam(player.parameters.values(), lr=lr, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for _ in range(steps):
        loss, _ = player.loss(0, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("reads", READS)
def test_a_diffusion_model_learns_one_batch_by_heart(folder, tmp_path, reads):
    losses = learned(task_of(folder, tmp_path, "run.batch=2", *READS[reads]), 40, 1e-2)
    assert losses[0] > 0.5 and losses[-1] < 0.02


def test_a_first_stage_learns_one_batch_by_heart(folder, tmp_path):
    """With its codes nearly free: the divergence has weight 1e-6. `test_vq_task.py` has the one with a table."""
    config = {
        "data": {"path": str(folder), "size": 16},
        "run": {"out": str(tmp_path), "batch": 2, "device": "cpu"},
        "autoencoder": {"base_channels": 16, "channel_mult": [1, 1], "num_res_blocks": 1, "norm_groups": 4},
    }
    losses = learned(AutoencoderTask(from_dict(AutoencoderTaskConfig, config)), 120, 1e-2)
    assert losses[0] > 0.3 and losses[-1] < 0.05, losses[-1]


# --- steps by hand ------------------------------------------------------------------------------------------

LR, DECAY, BETA1, BETA2, EPS = 3e-3, 0.1, 0.8, 0.95, 1e-8


def alpha_bar_by_hand() -> torch.Tensor:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0)


WEIGHTS = {  # of the squared error of eps and v, at a signal-to-noise ratio
    ("simple", "eps"): lambda snr: torch.ones_like(snr),
    ("simple", "v"): lambda snr: torch.ones_like(snr),
    ("min_snr", "eps"): lambda snr: torch.minimum(snr, torch.tensor(5.0)) / snr,
    ("min_snr", "v"): lambda snr: torch.minimum(snr, torch.tensor(5.0)) / (snr + 1),
    ("soft_min_snr", "eps"): lambda snr: 5 / (snr + 5),
    ("p2", "eps"): lambda snr: 1 / (1 + snr),
    ("edm", "eps"): lambda snr: (snr + 1) / snr,
}


@pytest.mark.parametrize(("weighting", "prediction"), WEIGHTS)
def test_two_steps_by_hand(folder, tmp_path, weighting, prediction):
    """Latents, noise, loss, gradient and AdamW without the code that is tested, but for the UNet itself.

    Two steps, since the first of Adam has the same size whatever the gradient's.
    """
    adam = [f"run.lr={LR}", f"run.weight_decay={DECAY}", f"run.betas=[{BETA1},{BETA2}]", "run.clip=1e9"]
    rare = [
        "run.warmup=0",
        "run.validate_every=0",
        "run.preview_every=0",
        "validation_levels=[]",
        "preview.steps=1",
    ]
    chosen = [f"loss.weighting={weighting}", f"diffusion.prediction={prediction}", "run.steps=2"]
    task = task_of(folder, tmp_path, *adam, *rare, *chosen, *READS["nothing"])
    rng = torch.Generator().manual_seed(1)
    for parameter in task.unet.parameters():  # also the layers that start at zero
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=rng)
    unet = UNet(task.config.unet)
    unet.load_state_dict(task.unet.state_dict())
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(folder / f"{i}.png"))) for i in range(5)])
    with torch.no_grad():
        posterior = task.autoencoder.encode(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1)
    weights = list(unet.parameters())
    start = nn.utils.parameters_to_vector(weights).detach()
    m, v = [torch.zeros_like(p) for p in weights], [torch.zeros_like(p) for p in weights]
    alpha_bar, scale, shift = (
        alpha_bar_by_hand(),
        task.autoencoder.config.scale_factor,
        task.autoencoder.config.shift_factor,
    )
    for step in range(2):
        rows, rng = batch_indices(5, 4, 0, step), generator(0, "train", step, 0)
        z = posterior.mean[rows] + posterior.std[rows] * torch.randn(4, 4, 8, 8, generator=rng)
        x0, t = (z - shift) * scale, torch.randint(1000, (4,), generator=rng)
        noise = torch.randn(4, 4, 8, 8, generator=rng)
        signal = alpha_bar[t].sqrt().float()[:, None, None, None]
        share = (1 - alpha_bar[t]).sqrt().float()[:, None, None, None]
        target = noise if prediction == "eps" else signal * noise - share * x0
        error = (unet(signal * x0 + share * noise, t) - target).pow(2).mean((1, 2, 3))
        weight = WEIGHTS[weighting, prediction](alpha_bar[t] / (1 - alpha_bar[t])).float()
        gradients = torch.autograd.grad((weight * error).mean(), weights)
        with torch.no_grad():
            for i, (p, g) in enumerate(zip(weights, gradients, strict=True)):
                m[i] = BETA1 * m[i] + (1 - BETA1) * g
                v[i] = BETA2 * v[i] + (1 - BETA2) * g * g
                first, second = m[i] / (1 - BETA1 ** (step + 1)), v[i] / (1 - BETA2 ** (step + 1))
                p -= LR * (DECAY * p + first / (second.sqrt() + EPS))
    train(task, False, "")
    state, _ = load_weights(tmp_path / "states" / "step-00000002.safetensors")
    ended = [state[f"weights/model/unet.{name}"] for name, _ in unet.named_parameters()]
    moved, by_hand = (nn.utils.parameters_to_vector(each).detach() - start for each in (ended, weights))
    assert (moved - by_hand).norm() < 1e-3 * moved.norm()  # of another weighting 0.1 and more
