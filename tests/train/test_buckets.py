"""Aspect-ratio buckets: the shapes and the choice in closed form, what an epoch covers, and a training on pictures
of three shapes through the command line.
"""

import json
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from coloured import write_first_stage, write_rows
from PIL import Image

from ldm.config import from_dict, load_config
from ldm.models.autoencoder import AutoencoderConfig, make_autoencoder
from ldm.weights.io import load_weights
from sample.images import square_rgb
from train.__main__ import main as train
from train.bucketed import Ragged, batch_rows, bucket_turn, in_parts, load_bucketed
from train.buckets import (
    BucketConfig,
    assign,
    bucket_shapes,
    cut_box,
    cut_rgb,
    describe,
    kept,
    nearest,
    scale,
    upright_size,
)
from train.data import DataConfig, batch_indices, to_float
from train.tasks.diffusion import DiffusionTask, DiffusionTaskConfig

# --- shapes and choice --------------------------------------------------------------------------------------


def test_shapes_in_closed_form():
    """At 512 in steps of 64: the largest height floor(512^2 / width / 64) 64, and each turned over."""
    landscapes = [(512, 512), (576, 448), (640, 384), (704, 320), (768, 320)]
    landscapes += [(832, 256), (896, 256), (960, 256), (1024, 256)]
    shapes = bucket_shapes(BucketConfig(), 512)
    assert shapes[0] == (512, 512)
    assert set(shapes) == {*landscapes, *((h, w) for w, h in landscapes)}
    assert len(shapes) == len(set(shapes)) == 17
    ratios = [max(shape) / min(shape) for shape in shapes]
    assert ratios == sorted(ratios)
    assert max(w * h for w, h in shapes) == 512**2


def test_limits_of_the_sides_and_the_ratio():
    narrow = bucket_shapes(BucketConfig(step=8, smallest=24, largest=48), 32)
    assert set(narrow) == {(32, 32), (40, 24), (24, 40)}  # 48 x 16 is too small
    ratio = bucket_shapes(BucketConfig(step=64, max_ratio=2.0), 512)
    assert set(ratio) == {(512, 512), (576, 448), (448, 576), (640, 384), (384, 640)}
    assert (48, 16) in bucket_shapes(BucketConfig(step=8, smallest=16, largest=50), 32)  # no side of 50


@pytest.mark.parametrize(
    ("config", "size", "what"),
    [
        (BucketConfig(step=24), 32, "data.size 32 must be a multiple of data.buckets.step 24"),
        (BucketConfig(step=8, smallest=40), 32, "no shape fits sides of 40 to 64 .* not even the square"),
        (BucketConfig(step=8, largest=24), 32, "no shape fits sides of 16 to 24 .* not even the square"),
        (BucketConfig(step=8, max_ratio=1.5), 32, "no shape but the square of data.size 32 fits"),
        (BucketConfig(step=64), 64, "no shape but the square .* in steps of 64"),
    ],
)
def test_where_no_shape_fits(config, size, what):
    with pytest.raises(ValueError, match=what):
        bucket_shapes(config, size)
    with pytest.raises(ValueError, match=what):
        DataConfig("here", size=size, buckets=BucketConfig(**{**vars(config), "on": True}))
    DataConfig("here", size=size, buckets=config)  # off, nothing is asked of it


@pytest.mark.parametrize(
    "values", [{"step": 0}, {"max_ratio": 0.5}, {"max_cut": 1.1}, {"fewest": -1}, {"smallest": -1}]
)
def test_values_out_of_range(values):
    with pytest.raises(ValueError, match=f"data.buckets.{next(iter(values))} is"):
        BucketConfig(**values)


def random_sizes(count=400):
    rng = np.random.default_rng(0)
    return [tuple(size) for size in np.exp(rng.uniform(3, 7.5, (count, 2))).astype(int).tolist()]


def test_the_nearest_ratio_cuts_least_and_never_enlarges_more_than_a_square():
    shapes = bucket_shapes(BucketConfig(), 512)
    for size in random_sizes():
        chosen = nearest(size, shapes, 512)
        logs = [abs(np.log(size[0] / size[1]) - np.log(w / h)) for w, h in shapes]
        assert logs[shapes.index(chosen)] == pytest.approx(min(logs), abs=1e-12)
        assert kept(size, chosen) == pytest.approx(np.exp(-min(logs)))
        assert scale(size, chosen) <= scale(size, (512, 512)) * (1 + 1e-12)


def test_what_is_cut_is_what_was_counted():
    """The part that is kept, to half a pixel at each side; it touches two sides of the picture."""
    for size in random_sizes(100):
        for shape in bucket_shapes(BucketConfig(), 512):
            left, top, right, bottom = cut_box(size, shape)
            width, height = right - left, bottom - top
            assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
            assert width == size[0] or height == size[1]
            assert abs(left - (size[0] - right)) <= 1 and abs(top - (size[1] - bottom)) <= 1
            assert width * height / (size[0] * size[1]) == pytest.approx(
                kept(size, shape), abs=0.5 / min(size) + 1e-9
            )


@pytest.mark.parametrize("size", [(33, 20), (20, 33), (50, 51), (7, 300), (16, 16)])
def test_the_square_is_that_of_square_mode(size):
    rng = np.random.default_rng(1)
    picture = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    assert cut_rgb(picture, (16, 16)).tobytes() == square_rgb(picture, 16).tobytes()


def test_a_bucket_of_too_few_gives_its_pictures_to_its_neighbour():
    shapes = bucket_shapes(BucketConfig(step=8), 32)
    sizes = [(320, 320)] * 5 + [(400, 240)] * 2 + [(640, 160)] * 5 + [(160, 640)]
    assert Counter(assign(sizes, shapes, 32)) == {(32, 32): 5, (40, 24): 2, (64, 16): 5, (16, 64): 1}
    # first the lone portrait, to the only shape near it, then the two
    assert Counter(assign(sizes, shapes, 32, 2)) == {(32, 32): 6, (40, 24): 2, (64, 16): 5}
    assert Counter(assign(sizes, shapes, 32, 3)) == {(32, 32): 8, (64, 16): 5}
    assert len(set(assign(sizes, shapes, 32, 100))) == 1
    assert assign([], shapes, 32, 4) == []


def test_among_those_left_one_that_enlarges_no_more_than_the_square_is_taken():
    """20x16 is nearer to 64x16 (ratio 4) than to 16x64, but 3.2 times as large there, 2 times as a square."""
    assert nearest((20, 16), [(64, 16), (32, 32)], 32) == (32, 32)
    assert nearest((36, 16), [(64, 16), (32, 32)], 32) == (64, 16)  # ratio 2.25 > 2: 1.8 times, not 2
    assert nearest((20, 16), [(64, 16)], 32) == (64, 16)
    assert "1 are enlarged, 1 of them more than for a square" in describe([(20, 16)], [(64, 16)], 32)


def test_the_report_counts():
    sizes, chosen = [(64, 64), (16, 8), (100, 40)], [(32, 32), (40, 24), (40, 24)]
    line = describe(sizes, chosen, 32)
    assert line.startswith("3 pictures in 2 buckets (32x32: 1, 40x24: 2); ")
    cuts = [0, 1 - 5 / 6, 1 - 2 / 3]
    assert f"{sum(cuts) / 3:.1%} is cut on average, {max(cuts):.1%} at most" in line
    assert f"by squares {(0 + 0.5 + 0.6) / 3:.1%}" in line
    assert "1 are enlarged, 0 of them more than for a square" in line


def test_the_size_of_a_picture_that_is_turned(tmp_path):
    picture = Image.new("RGB", (30, 20))
    exif = picture.getexif()
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        picture.save(tmp_path / "a.jpg", exif=exif)
        assert upright_size(tmp_path / "a.jpg") == ((20, 30) if orientation > 4 else (30, 20))
        assert upright_size(Path("none"), (tmp_path / "a.jpg").read_bytes()) == upright_size(
            tmp_path / "a.jpg"
        )


# --- the order ----------------------------------------------------------------------------------------------


def ragged(counts, shuffled=True):
    which = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    if shuffled:
        which = which[torch.randperm(len(which), generator=torch.Generator().manual_seed(0))]
    rows = torch.arange(len(which)).float()
    parts = [rows[which == bucket][:, None].expand(-1, bucket + 1) for bucket in range(len(counts))]
    return Ragged(parts, which)


def test_rows_of_several_shapes():
    data = ragged([5, 3, 4])
    for bucket, members in enumerate(data.members):
        assert data[members.flip(0)].shape == (len(members), bucket + 1)
        assert torch.equal(data[members.flip(0)][:, 0], members.flip(0).float())
    first = data[:6]
    assert len(first) == 6
    for rows in first.members:
        assert torch.equal(first[rows][:, 0], rows.float())
    assert len(data[:0]) == 0 and data[:0].parts == []
    assert sorted(torch.cat(in_parts(data, 2)).tolist()) == list(range(12))
    assert [len(rows) for rows in in_parts(data, 2)] == [2, 2, 1, 2, 1, 2, 2]
    assert [rows.tolist() for rows in in_parts(torch.zeros(3, 1), 2)] == [[0, 1], [2]]


@pytest.mark.parametrize(("counts", "batch"), [((20, 7, 5), 4), ((4, 4), 4), ((9,), 4), ((50, 6, 11, 30), 5)])
def test_an_epoch_covers_every_picture(counts, batch):
    """After e epochs of the set, each picture was seen e or e - 1 times; after `batch` of them, e times."""
    data, epoch, step = ragged(list(counts)), 0, 0
    seen = torch.zeros(len(data), dtype=torch.int64)
    own: list[list[int]] = [[] for _ in counts]
    while epoch < batch:
        epoch += 1
        while step < sum(epoch * n // batch for n in counts):
            rows = batch_rows(data, batch, 7, step)
            bucket = int(data.which[rows[0]])
            assert len(rows) == batch and bool((data.which[rows] == bucket).all())
            seen += torch.bincount(rows, minlength=len(data))
            own[bucket] += rows.tolist()
            step += 1
        assert seen.min() >= epoch - 1 and seen.max() <= epoch
        assert seen.sum() == step * batch > epoch * len(data) - len(counts) * batch
    assert seen.unique().tolist() == [batch]
    for bucket, n in enumerate(counts):  # each picture at most once in an epoch of its bucket
        for start in range(0, len(own[bucket]), n):
            assert sorted(own[bucket][start : start + n]) == data.members[bucket].tolist()


def test_a_bucket_smaller_than_a_batch_waits_for_its_turn():
    """Three pictures in batches of 8, by the side of 13: 3 of 16 steps are theirs, the first in epoch 3."""
    turns = [bucket_turn((13, 3), 8, 0, step) for step in range(16)]
    assert [turn for bucket, turn in turns if bucket == 1] == [0, 1, 2]
    assert 1 not in [bucket for bucket, _ in turns[:3]]
    data = ragged([13, 3])
    rows = torch.cat([batch_rows(data, 8, 0, step) for step in range(16)])
    assert torch.bincount(rows).tolist() == [8] * 16


def test_the_order_is_a_function_of_seed_and_step():
    data = ragged([20, 7, 5])
    rows = [batch_rows(data, 4, 3, step) for step in range(50)]
    for step in reversed(range(50)):
        assert torch.equal(batch_rows(data, 4, 3, step), rows[step])
    assert any(not torch.equal(batch_rows(data, 4, 4, step), rows[step]) for step in range(5))
    epochs = [tuple(int(data.which[row[0]]) for row in rows[start : start + 8]) for start in (0, 8, 16, 24)]
    assert len(set(epochs)) > 1  # the buckets come in another order in each
    far = batch_rows(data, 4, 3, 10**9)  # at once, not after a billion steps
    assert len(far) == 4


def test_one_bucket_is_the_order_of_square_mode():
    for step in range(20):
        expected = batch_indices(11, 4, 5, step)
        assert torch.equal(batch_rows(ragged([11]), 4, 5, step), expected)
        assert torch.equal(batch_rows(torch.zeros(11, 1), 4, 5, step), expected)


# --- from a folder to a model -------------------------------------------------------------------------------

SHAPES = ((32, 32), (80, 48), (24, 96))  # in pictures of these sizes, the last one tall
BUCKETS = ["data.buckets.on=true", "data.buckets.step=8"]
TINY = "configs/train/tiny.yaml"
SHORT = [
    "run.steps=6",
    "run.checkpoint_every=3",
    "run.validate_every=3",
    "run.preview_every=0",
    "validation_levels=[1.0]",
    "run.batch=4",
    "preview.steps=1",
    "text=null",
    "classes.num_classes=4",
    "classes.dim=32",
    "classes.null_class=3",
    "preview.prompts=['0','1']",
    "masked=true",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> list[str]:
    """Overrides that name 24 pictures of three shapes, one third held out, and a first stage of random weights."""
    folder, rng = tmp_path_factory.mktemp("made"), np.random.default_rng(0)
    (folder / "masks").mkdir()
    rows = []
    for number in range(24):
        w, h = SHAPES[number % 3]
        Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        row = {"file_name": f"{number}.png", "text": f"noise {number}", "label": number % 3}
        row["split"] = "heldout_image" if number % 8 > 5 else "train"
        if number % 2:
            mask = np.zeros((h, w), dtype=np.uint8)
            mask[:, : w // 2] = 255
            Image.fromarray(mask).save(folder / "masks" / f"{number}.png")
            row["mask"] = f"masks/{number}.png"
        rows.append(row)
    write_rows(folder, rows)
    return [f"data.path={folder}", write_first_stage(folder), "run.device=cpu", *SHORT, *BUCKETS]


def data_config(made, strict=False, workers=0, **options):
    settings = {"step": 8, "on": True} | options
    return DataConfig(
        made[0].removeprefix("data.path="),
        size=32,
        buckets=BucketConfig(**settings),
        strict=strict,
        workers=workers,
    )


def test_pictures_are_read_in_their_shapes(made):
    images = load_bucketed(data_config(made), "train", 4)
    assert images.shapes == [(16, 64), (32, 32), (40, 24)]
    assert [tuple(part.shape) for part in images.pixels.parts] == [
        (6, 3, 64, 16),
        (6, 3, 32, 32),
        (6, 3, 24, 40),
    ]
    assert len(images) == len(images.pixels) == len(images.files) == 18
    squares = torch.tensor([row for row, file in enumerate(images.files) if int(file[:-4]) % 3 == 0])
    folder = Path(made[0].removeprefix("data.path="))
    pictures = [np.array(Image.open(folder / images.files[row])) for row in squares.tolist()]
    assert torch.equal(images.pixels[squares], torch.tensor(np.stack(pictures)).permute(0, 3, 1, 2))
    assert "16x64: 6, 32x32: 6, 40x24: 6" in images.summary and "; 0 are enlarged" in images.summary
    held = load_bucketed(data_config(made), "heldout_image", 4, [(32, 32), (40, 24)])
    assert held.shapes == [(32, 32), (40, 24)] and len(held) == 6


def test_the_number_of_workers_changes_nothing(made):
    alone, many = (load_bucketed(data_config(made, workers=count), "train", 4) for count in (0, 2))
    assert alone.files == many.files and alone.summary == many.summary
    for one, other in zip(alone.pixels.parts, many.pixels.parts, strict=True):
        assert torch.equal(one, other)


def test_an_unreadable_picture_is_left_out(made, tmp_path):
    """One that is seen to be when its size is asked for, and one that is not before all of it is read."""
    for number in (0, 3, 4, 5):
        shutil.copy(Path(made[0].removeprefix("data.path=")) / f"{number}.png", tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "1.jpg")
    content = (tmp_path / "1.jpg").read_bytes()
    (tmp_path / "1.jpg").write_bytes(content[: len(content) // 2])
    (tmp_path / "2.png").write_text("none")
    here = [f"data.path={tmp_path}"]
    with pytest.warns(
        UserWarning, match=r"2 of 6 images could not be read and are skipped: .*2\.png.*1\.jpg"
    ):
        images = load_bucketed(data_config(here), None, 1)
    assert images.files == ["0.png", "3.png", "4.png", "5.png"]
    assert [len(part) for part in images.pixels.parts] == [1, 2, 1]
    with pytest.raises(ValueError, match=r"2\.png: not an image"):
        load_bucketed(data_config(here, strict=True), None, 1)
    (tmp_path / "2.png").unlink()
    with pytest.raises(ValueError, match=r"1\.jpg: unreadable"):
        load_bucketed(data_config(here, strict=True), None, 1)


def test_pictures_in_a_shard_are_those_of_the_folder(made, tmp_path):
    folder, file = Path(made[0].removeprefix("data.path=")), tmp_path / "0.tar"
    with tarfile.open(file, "w") as shard:
        for number in range(6):
            shard.add(folder / f"{number}.png", f"{number}.png")
            (tmp_path / "caption").write_text(f"noise {number}")
            shard.add(tmp_path / "caption", f"{number}.txt")
    images = load_bucketed(data_config([f"data.path={file}"]), None, 1)
    expected = load_bucketed(data_config(made), None, 1)
    assert images.captions == expected.captions[:6]
    for row in torch.arange(6).split(1):
        assert torch.equal(images.pixels[row], expected.pixels[row])


def test_an_extreme_picture_may_be_left_out(made):
    with pytest.warns(
        UserWarning, match=r"6 of 18 .* are skipped: .*no bucket fits 24x96 pixels, 58% would be"
    ):
        images = load_bucketed(data_config(made, max_ratio=2.0, max_cut=0.3), "train", 4)
    assert len(images) == 12 and images.shapes == [(32, 32), (40, 24)]
    with pytest.raises(ValueError, match="no bucket fits 24x96"):
        load_bucketed(data_config(made, max_ratio=2.0, max_cut=0.3, strict=True), "train", 4)


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_weights(folder / "states" / f"step-{step:08d}.safetensors")[0]


def test_a_training_on_three_shapes_resumes_bit_for_bit(made, tmp_path, capsys):
    """An unbroken run, and a copy of it cut back to step 3 whose cache is gone; the steps see all three shapes."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train(["diffusion", TINY, *made, f"run.out={whole}"]) == 0
    out = capsys.readouterr().out
    assert "train: 18 pictures in 3 buckets (16x64: 6, 32x32: 6, 40x24: 6)" in out
    assert "heldout_image: 6 pictures in 3 buckets" in out
    kinds = {path.name.rsplit("-", 1)[0] for path in (whole / "cache").iterdir()}
    shapes = ("16x64", "32x32", "40x24")
    assert kinds == {f"{split}-{shape}" for split in ("train", "heldout") for shape in shapes}
    with Image.open(whole / "previews" / "step-00000006.png") as sheet:  # two prompts, a row for each shape
        assert sheet.size == (2 * (40 + 2) + 2, 3 * (64 + 2) + 2)
    rows = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if np.isfinite(row.get("validation_loss", np.nan))] == [3, 6]

    shutil.copytree(whole, cut)
    (cut / "states" / "step-00000006.safetensors").unlink()
    shutil.rmtree(cut / "cache")
    assert train(["diffusion", TINY, *made, f"run.out={cut}", "--resume"]) == 0
    assert "resumed at step 3" in capsys.readouterr().out
    expected, resumed = weights(whole, 6), weights(cut, 6)
    assert expected.keys() == resumed.keys()
    assert [name for name in expected if not torch.equal(expected[name], resumed[name])] == []


def task_of(made, folder, *overrides) -> DiffusionTask:
    return DiffusionTask(load_config(DiffusionTaskConfig, TINY, [*made, f"run.out={folder}", *overrides]))


def test_what_a_step_sees(made, tmp_path):
    """Latents and masks of one shape, of the pictures that `batch_rows` names, whatever the accumulation."""
    task = task_of(made, tmp_path)
    pixels = task.images.pixels
    seen, shapes = [], set()
    task.unet.register_forward_pre_hook(lambda module, given: seen.append(tuple(given[0].shape)))
    for step in range(12):
        rows = batch_rows(pixels, 4, 0, step)
        task.loss(step, 0)
        _, _, h, w = pixels[rows].shape
        assert seen[-1] == (4, 4, h // 4, w // 4) == task.data.mean[rows].shape
        assert task.data.masks[rows].shape == (4, 1, h // 4, w // 4)
        shapes.add((w, h))
    assert shapes == set(task.images.shapes)
    half = task_of(made, tmp_path, "run.accumulate=2")
    assert torch.equal(torch.cat([half._rows(3, part) for part in (0, 1)]), batch_rows(pixels, 4, 0, 3))


def test_masks_are_cut_as_their_pictures_are(made, tmp_path):
    task = task_of(made, tmp_path)
    for row, file in enumerate(task.images.files):
        number = int(file[:-4])
        mask = task.data.masks[torch.tensor([row])][0, 0]  # (h, w)
        w = mask.shape[1]
        expected = torch.ones_like(mask)
        if number % 2:
            expected[:, w // 2 :] = 0
        assert mask.shape == task.data.mean[torch.tensor([row])].shape[2:]
        torch.testing.assert_close(mask, expected, atol=0.51 if w % 2 else 0.05, rtol=0)


def test_with_squares_alone_buckets_change_nothing(made, tmp_path):
    """The same losses, bit for bit, as without buckets, where every picture is a square."""
    folder = tmp_path / "squares"
    folder.mkdir()
    rows = []
    for number in range(0, 24, 3):
        shutil.copy(Path(made[0].removeprefix("data.path=")) / f"{number}.png", folder)
        rows.append({"file_name": f"{number}.png", "text": "", "label": 0})
    write_rows(folder, rows)
    squares = [*made, f"data.path={folder}", "masked=false"]
    losses = {}
    for on in ("true", "false"):
        task = task_of(squares, tmp_path / on, f"data.buckets.on={on}")
        with torch.no_grad():
            losses[on] = [task.loss(step, 0)[0].item() for step in range(3)], task.validate()
    assert losses["true"] == losses["false"]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["data.buckets.step=4"], "data.buckets.step 4 must be a multiple of the autoencoder's factor times"),
        (["data.buckets.step=24"], "data.size 32 must be a multiple of data.buckets.step 24"),
        (["data.buckets.smallest=40"], "no shape fits sides of 40 to 64 pixels"),
        (["data.buckets.max_ratio=1.2"], "no shape but the square"),
        (["data.buckets.max_ratio=x"], "data.buckets.max_ratio"),
        (["data.buckets.max_ratio=2", "data.buckets.max_cut=0.1", "data.strict=true"], "no bucket fits"),
        (["run.compile=true"], "data.buckets.on=true needs run.compile=false"),
        (["data.stream=true"], "data.buckets.on=true needs data.stream=false"),
        (["data.buckets.stepp=8"], "did you mean data.buckets.step?"),
    ],
)
def test_bad_values_are_one_line(made, tmp_path, capsys, overrides, told):
    assert train(["diffusion", TINY, *made, f"run.out={tmp_path / 'new'}", *overrides]) == 2
    line = capsys.readouterr().err.strip()
    assert told in line and "\n" not in line
    assert not (tmp_path / "new").exists()


# --- the first stage ----------------------------------------------------------------------------------------

STAGE = [
    "run.steps=4",
    "run.checkpoint_every=2",
    "run.batch=4",
    "run.validate_every=0",
    "run.preview_every=0",
]


def test_a_first_stage_learns_on_three_shapes_and_resumes_bit_for_bit(made, tmp_path, capsys):
    config, where = "configs/train/tiny_autoencoder.yaml", [made[0], "run.device=cpu", *STAGE, *BUCKETS]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train(["autoencoder", config, *where, f"run.out={whole}"]) == 0
    shutil.copytree(whole, cut)
    (cut / "states" / "step-00000004.safetensors").unlink()
    (cut / "model" / "autoencoder.safetensors").unlink()
    assert train(["autoencoder", config, *where, f"run.out={cut}", "--resume"]) == 0
    out = capsys.readouterr().out
    assert "16x64: 6, 32x32: 6, 40x24: 6" in out and "resumed at step 2" in out
    expected, resumed = weights(whole, 4), weights(cut, 4)
    assert [name for name in expected if not torch.equal(expected[name], resumed[name])] == []
    with Image.open(whole / "previews" / "step-00000004.png") as sheet:  # six held-out pictures over theirs
        assert sheet.size == (6 * (40 + 2) + 2, 2 * (64 + 2) + 2)
    tensors, header = load_weights(whole / "model" / "autoencoder.safetensors")
    model = make_autoencoder(from_dict(AutoencoderConfig, header["config"]))
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    images = load_bucketed(data_config(made), "train", 4)
    latents = [model.encode_latents(to_float(part)).flatten() for part in images.pixels.parts]
    torch.testing.assert_close(torch.cat(latents).mean(), torch.tensor(0.0), atol=2e-2, rtol=0)
    torch.testing.assert_close(torch.cat(latents).std(), torch.tensor(1.0), atol=2e-2, rtol=0)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["data.buckets.step=2"], "data.buckets.step 2 must be a multiple of the autoencoder's factor 4"),
        (["data.buckets.smallest=40"], "no shape fits"),
        (
            ["loss.adversarial_weight=0.5", "loss.discriminator.layers=3"],
            "images of 48x16 are too small",
        ),
    ],
)
def test_bad_values_of_a_first_stage_are_one_line(made, tmp_path, capsys, overrides, told):
    where = [made[0], "run.device=cpu", *STAGE, *BUCKETS, f"run.out={tmp_path / 'new'}"]
    assert train(["autoencoder", "configs/train/tiny_autoencoder.yaml", *where, *overrides]) == 2
    line = capsys.readouterr().err.strip()
    assert told in line and "\n" not in line
