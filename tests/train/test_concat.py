"""Training of models that read a picture beside their latents: each kind against what its sampling gives it,
overfitted, resumed, and run through its command; the random masks and the bad small pictures."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from coloured import put, write_rows, write_small_stage
from networks import randomised
from PIL import Image

from ldm.config import load_config
from ldm.diffusion.editing import inpainting_channels, masked_picture
from ldm.models.clip import TextConfig, TextEncoder
from ldm.seeding import generator
from ldm.weights.io import load_weights
from ldm.weights.reading import open_checkpoint
from sample.__main__ import main as sample
from sample.images import to_tensor
from sample.start import mask_channels, picture_channels, reads
from train.__main__ import main as train
from train.concat import Concat, ConcatConfig, random_masks, smaller
from train.data import batch_indices
from train.evaluation import Evaluation, evaluate
from train.tasks.diffusion import DiffusionTask, DiffusionTaskConfig

TINY = "configs/train/tiny.yaml"
RUN = [
    "run.device=cpu",
    "run.steps=2",
    "run.batch=4",
    "run.warmup=0",
    "run.checkpoint_every=1",
    "run.validate_every=0",
    "run.preview_every=0",
    "validation_levels=[1.0]",
    "preview.steps=1",
    "preview.prompts=[]",
    "data.size=16",
    "unet.model_channels=16",
    "unet.norm_groups=4",
]
PLAIN = ["text=null", "unet.context_dim=null", "caption_dropout=0"]
TEXT = ["text=null", "tower.checkpoint=TOWER"]
KINDS = {  # 4 channels of latents; how each is sampled
    "inpainting": (["concat.kind=inpainting", "unet.in_channels=9", *TEXT], "inpaint"),
    "ldm_inpainting": (["concat.kind=inpainting", "unet.in_channels=9", *PLAIN], "inpaint"),
    "superresolution": (["concat.kind=low_resolution", "unet.in_channels=7", *PLAIN], "upscale"),
    "instruct": (["concat.kind=edit", "concat.dropout=0.1", "unet.in_channels=8", *TEXT], "instruct"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Noisy pictures of one colour each, their edits the other way round; a first stage, f2, and a text tower."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    rows = []
    for number in range(8):
        pixels = (rng.integers(0, 200, 3) + rng.integers(0, 56, (16, 16, 3))).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        Image.fromarray(255 - pixels).save(folder / f"source-{number}.png")
        split = "heldout_image" if number > 5 else "train"
        row = {"file_name": f"{number}.png", "text": "turn it", "split": split}
        rows.append(row | {"source": f"source-{number}.png"})
    write_rows(folder, rows)
    write_small_stage(folder)
    tower = TextEncoder(TextConfig(width=32, layers=1, heads=2, mlp_width=64, repeat_end=True))
    put(folder / "tower.safetensors", randomised(tower))
    return folder


def options(folder: Path, out: Path, kind: str, *more: str) -> list[str]:
    made = [f"data.path={folder}", f"autoencoder={folder / 'autoencoder.safetensors'}", f"run.out={out}"]
    own = [value.replace("TOWER", str(folder / "tower.safetensors")) for value in KINDS[kind][0]]
    return ["diffusion", TINY, *made, *RUN, *own, *more]


def task_of(folder: Path, out: Path, kind: str, *more: str) -> DiffusionTask:
    return DiffusionTask(load_config(DiffusionTaskConfig, TINY, options(folder, out, kind, *more)[2:]))


def state(out: Path, step: int = 2) -> dict[str, torch.Tensor]:
    return load_weights(out / "states" / f"step-{step:08d}.safetensors")[0]


# --- the run ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_trains_resumes_bit_for_bit_and_runs_through_its_command(folder, tmp_path, kind):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train(options(folder, whole, kind)) == 0
    shutil.copytree(whole, cut, ignore=shutil.ignore_patterns("cache", "*2.safetensors"))
    assert train([*options(folder, cut, kind), "--resume"]) == 0
    expected, resumed = state(whole), state(cut)
    assert expected.keys() == resumed.keys()
    assert [name for name in expected if not torch.equal(expected[name], resumed[name])] == []
    with Image.open(whole / "previews" / "step-00000002.png") as grid:
        assert grid.size == (2 * 18 + 2, 2 * 18 + 2)  # the two held-out pictures, and what is made of them
    rows = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert all(
        {"validation_loss", "validation_error@1"} <= row.keys() for row in rows if "validation_loss" in row
    )
    files = {"inpaint": ["0.png", str(folder / "1.png")], "upscale": ["0.png"], "instruct": ["0.png"]}
    name = KINDS[kind][1]
    given = [str(folder / files[name][0]), *files[name][1:], *([] if name == "upscale" else ["turn it"])]
    if kind == "ldm_inpainting":
        given[2] = ""
    how = ["--model", str(whole), "--device", "cpu", "--steps", "1", "--out", str(tmp_path / "out")]
    assert sample([name, *given, *how]) == 0
    with Image.open(tmp_path / "out" / "00000.png") as picture:
        assert picture.size == ((32, 32) if name == "upscale" else (16, 16))


@pytest.mark.parametrize("kind", ["ldm_inpainting", "superresolution", "instruct"])
def test_one_batch_is_learned_by_heart(folder, tmp_path, kind):
    """One fixed batch with its noise, masks and small pictures, by Adam; far below what the start costs."""
    task = task_of(folder, tmp_path, kind, "diffusion.prediction=eps", "run.batch=2", "unet.channel_mult=[1]")
    parameters = task.players["model"].parameters.values()
    optimizer = torch.optim.Adam(parameters, lr=1e-2, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
    losses = []
    for _ in range(40):
        loss, _ = task.loss(0, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    assert losses[0] > 0.5 and losses[-1] < 0.02


# --- what the network reads ---------------------------------------------------------------------------------


def channels_seen(task: DiffusionTask, step: int = 0) -> torch.Tensor:
    seen = []
    handle = task.unet.register_forward_pre_hook(lambda module, given: seen.append(given[0][:, 4:]))
    task.loss(step, 0)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("kind", ["inpainting", "ldm_inpainting"])
def test_the_masked_picture_is_that_of_sampling(folder, tmp_path, kind):
    """The same mask and picture through `sample.start` give the same channels but for the posterior's noise,
    which is next to nothing here."""
    task = task_of(folder, tmp_path, kind)
    task.autoencoder.quant_conv.weight.data[4:] = 0
    task.autoencoder.quant_conv.bias.data[4:] = -30.0  # log-variance
    seen, pipe = channels_seen(task), task.pipeline()
    assert reads(pipe) == kind
    rows = batch_indices(6, 4, 0, 0).tolist()
    masks = random_masks(4, (16, 16), 0.25, generator(0, "concat", "train", 0, 0))
    for channels, row, mask in zip(seen, rows, masks, strict=True):
        image = to_tensor(Image.open(folder / f"{row}.png"))[None]
        wanted = mask_channels(pipe, image, mask, 0, [0])
        torch.testing.assert_close(channels[None], wanted, atol=1e-4, rtol=0)


def test_masks_and_pictures_are_functions_of_seed_and_step(folder, tmp_path):
    task = task_of(folder, tmp_path, "ldm_inpainting")
    again = task_of(folder, tmp_path, "ldm_inpainting")
    assert torch.equal(channels_seen(task, 3), channels_seen(again, 3))
    assert not torch.equal(channels_seen(task, 3), channels_seen(task, 4))
    other = task_of(folder, tmp_path, "ldm_inpainting", "run.seed=1")
    assert not torch.equal(channels_seen(task, 3)[:, -1], channels_seen(other, 3)[:, -1])
    with torch.no_grad():
        assert task.validate() == task.validate()


def test_masked_latents_are_a_draw_from_the_posterior(folder, tmp_path):
    task = task_of(folder, tmp_path, "inpainting")
    key = (0, "concat", "train", 0, 0)
    rows, rng = batch_indices(6, 4, 0, 0), generator(*key)
    images = task.images.pixels[rows].float() / 127.5 - 1
    mask = random_masks(4, (16, 16), 0.25, rng)
    posterior = task.autoencoder.encode(masked_picture(images, mask, "inpainting"))
    noise = torch.randn(posterior.mean.shape, generator=rng)
    latents = task.autoencoder.scale_latents(posterior.mean + posterior.std * noise)
    torch.testing.assert_close(channels_seen(task), inpainting_channels(mask, latents, "inpainting"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_finished_model_is_asked_for_its_errors_by_level(folder, tmp_path, kind):
    """By `ldm-train ablate`, with channels that a function of the seed makes; other channels, other errors."""
    assert train(options(folder, tmp_path, kind)) == 0
    config = load_config(DiffusionTaskConfig, TINY, options(folder, tmp_path, kind)[2:])
    asked = [Evaluation(levels=(0.5, 2.0), seed=seed) for seed in (0, 0, 1)]
    first, again, other = (evaluate(tmp_path, config, each) for each in asked)
    assert set(first) == {"error@0.5", "error@2"} and all(0 < value < 100 for value in first.values())
    assert first == again != other


def test_an_edit_model_reads_the_source_as_instruct_gives_it(folder, tmp_path):
    task = task_of(folder, tmp_path, "instruct", "concat.dropout=0")
    seen, pipe = channels_seen(task), task.pipeline()
    for channels, row in zip(seen, batch_indices(6, 4, 0, 0).tolist(), strict=True):
        image = to_tensor(Image.open(folder / f"source-{row}.png"))[None]
        torch.testing.assert_close(channels[None], picture_channels(pipe, image, [0]), atol=1e-5, rtol=0)


def test_in_buckets_a_source_is_cut_as_its_picture(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "set")
    for path in (tmp_path / "set").glob("*[1357].png"):
        Image.open(path).resize((32, 8)).save(path)
    buckets = ["data.buckets.on=true", "data.buckets.step=4", "run.batch=2", "concat.dropout=0"]
    task, shapes = task_of(tmp_path / "set", tmp_path, "instruct", *buckets), set()
    pipe = task.pipeline()
    for step in range(4):
        seen = channels_seen(task, step)
        shapes.add(seen.shape[2:])
        for channels, row in zip(seen, task._rows(step, 0).tolist(), strict=True):
            source = to_tensor(Image.open(tmp_path / "set" / f"source-{task.images.files[row]}"))[None]
            assert_close = torch.testing.assert_close
            assert_close(channels[None], picture_channels(pipe, source, [0]), atol=1e-5, rtol=0)
    assert shapes == {(8, 8), (4, 16)}


def test_a_small_picture_is_the_training_picture_made_small(folder, tmp_path):
    """Without the camera's faults it is what Pillow's filter makes of the file, to a step of 1/255."""
    task = task_of(folder, tmp_path, "superresolution", "concat.degradation=bicubic")
    for channels, row in zip(channels_seen(task), batch_indices(6, 4, 0, 0).tolist(), strict=True):
        picture = Image.open(folder / f"{row}.png").resize((8, 8), Image.Resampling.BICUBIC)
        assert (channels - to_tensor(picture)).abs().max() < 2.1 / 127.5
    camera = channels_seen(task_of(folder, tmp_path, "superresolution"))
    assert (camera - channels_seen(task)).abs().amax((1, 2, 3)).min() > 2.1 / 127.5


def test_dropped_pictures_are_zeros_and_fall_as_in_the_original(folder, tmp_path):
    """At 0.1 and 0.1: 5 % without caption alone, 5 % without picture alone, 5 % without both."""
    concat = Concat(
        ConcatConfig("edit", dropout=0.1), "instruct", task_of(folder, tmp_path, "instruct").autoencoder, 0
    )
    count = 20_000
    kept = concat.without(torch.ones(count, 4, 1, 1), 0.1, 0, 0)[:, 0, 0, 0] == 1
    caption = torch.rand(count, generator=generator(0, "caption", 0, 0)) >= 0.1
    for share in (~kept & caption, kept & ~caption, ~kept & ~caption):
        assert abs(float(share.float().mean()) - 0.05) < 0.006
    seen = channels_seen(task_of(folder, tmp_path, "instruct", "concat.dropout=1"))
    u = torch.rand(4, generator=generator(0, "caption", 0, 0))
    assert [not row.any() for row in seen] == [value >= 0.05 for value in u.tolist()]


# --- fine-tuning of a model that read nothing besides -------------------------------------------------------


def test_new_input_channels_start_at_zero(folder, tmp_path):
    plain = tmp_path / "plain"
    own = [f"tower.checkpoint={folder / 'tower.safetensors'}", "text=null", "run.steps=1"]
    command = options(folder, plain, "inpainting")
    command = [part for part in command if not part.startswith(("concat.", "unet.in_channels"))]
    assert train([*command, *own]) == 0
    task = task_of(folder, tmp_path / "new", "inpainting", f"init_from={plain}")
    first = open_checkpoint(plain).require("unet").tensors(torch.float32)
    weight = task.unet.conv_in.weight
    assert torch.equal(weight[:, :4], first["conv_in.weight"]) and not weight[:, 4:].any()
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([5, 900]), torch.randn(2, 77, 32)
    inner = task_of(folder, tmp_path / "new", "inpainting", f"init_from={plain}").unet
    assert torch.equal(
        inner(torch.cat([x, torch.randn(2, 5, 8, 8)], 1), t, context),
        task.unet(torch.cat([x, torch.zeros(2, 5, 8, 8)], 1), t, context),
    )


# --- masks and small pictures -------------------------------------------------------------------------------


def test_masks_are_what_their_shares_say():
    masks = random_masks(600, (24, 16), 0.25, generator(0))
    assert masks.shape == (600, 1, 24, 16)
    covered = masks.float().mean((1, 2, 3))
    assert covered.min() > 0
    assert abs(float((covered == 1).float().mean()) - 0.25) < 0.06
    assert 0.1 < covered[covered < 1].mean() < 0.6
    assert masks[:, 0, 12, 8].float().mean() > masks[:, 0, 0, 0].float().mean()
    assert random_masks(50, (16, 16), 1.0, generator(1)).all()
    assert not random_masks(50, (64, 64), 0.0, generator(1)).all((1, 2, 3)).any()


def test_small_pictures_are_bytes_and_functions_of_their_draw():
    images = torch.rand(6, 3, 32, 24, generator=generator(0)) * 2 - 1
    for degradation in ("bicubic", "camera"):
        small = smaller(images, 4, degradation, generator(1))
        assert small.shape == (6, 3, 8, 6) and small.abs().max() <= 1
        steps = (small + 1) * 127.5
        torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)
        assert torch.equal(small, smaller(images, 4, degradation, generator(1)))
    flat = torch.full((40, 3, 16, 16), 0.2)
    bad = smaller(flat, 4, "camera", generator(2))
    assert (smaller(flat, 4, "bicubic", generator(2)) - 0.2).abs().max() < 0.5 / 127.5
    deviation = bad.std((1, 2, 3))
    assert deviation.min() < 0.03 and 0.05 < deviation.max() < 0.15


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "overrides", "told"),
    [
        ("inpainting", ["concat.kind=paint"], "concat.kind must be one of inpainting, low_resolution, edit"),
        ("inpainting", ["unet.in_channels=8"], "unet.in_channels must be 9, not 8"),
        ("inpainting", ["concat.dropout=0.1"], "concat.dropout is for concat.kind=edit"),
        ("inpainting", ["concat.everywhere=2"], "concat.everywhere must be in 0..1, got 2"),
        ("inpainting", ["preview.prompts=[a]"], "preview.prompts=[]"),
        ("inpainting", ["concat=null"], "unet.in_channels 9 are more than the latents' 4"),
        ("superresolution", ["concat.degradation=jpeg"], "concat.degradation must be 'bicubic' or 'camera'"),
        ("superresolution", ["concat.kind=edit", "unet.in_channels=8"], "edit is for a model with a text"),
        ("instruct", ["concat.kind=low_resolution", "concat.dropout=0"], "is for a model without a text"),
        ("instruct", ["data.caption_column=source", "data.path=BARE"], "no row has a column 'source'"),
        ("instruct", ["data.path=PARTLY"], "1.png has no source, the picture that it is an edit of"),
        ("instruct", ["data.path=OUTSIDE"], "source '../0.png' is no file name inside the folder"),
        ("instruct", ["data.path=MISSING"], "nothing.png: no such file"),
    ],
)
def test_bad_input_is_one_line(folder, tmp_path, capsys, kind, overrides, told):
    rows = [{"file_name": f"{n}.png", "text": "turn it", "source": f"source-{n}.png"} for n in range(3)]
    sets = {"BARE": {}, "PARTLY": {}, "OUTSIDE": {"source": "../0.png"}, "MISSING": {"source": "nothing.png"}}
    for name, change in sets.items():
        shutil.copytree(folder, tmp_path / name)
        changed = [dict(row) for row in rows]
        for number, row in enumerate(changed):
            if name == "BARE" or (name == "PARTLY" and number == 1):
                del row["source"]
            row |= change if number == 1 else {}
        (tmp_path / name / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
    overrides = [
        value.replace("path=", f"path={tmp_path}/")
        for value in overrides
        if value != "data.caption_column=source"
    ]
    assert train(options(folder, tmp_path / "new", kind, "data.heldout=0", *overrides)) == 2
    line = capsys.readouterr().err.strip()
    assert told in line and "\n" not in line and line.startswith("ldm-train: error: ")
