"""Prior preservation: both normalisations against references by hand, pictures made once, by any number of ranks."""

import shutil

import pytest
import torch
from personal import PRIOR, make, task_of

import train.prior
from ldm.diffusion.loss import LossConfig, diffusion_loss
from sample.images import read_parameters, to_pil
from sample.pipeline import Pipeline
from train.prior import PriorConfig, class_pictures, combined


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make(tmp_path_factory.mktemp("prior"))


def as_diffusers(losses: torch.Tensor, weight: float) -> torch.Tensor:
    """`model_pred.chunk(2)`, a mean each."""
    subject, prior = losses.chunk(2)
    return subject.mean() + weight * prior.mean()


def as_kohya(losses: torch.Tensor, is_prior: torch.Tensor, weight: float) -> torch.Tensor:
    """Each picture has a weight, then the mean over the batch."""
    return (losses * torch.where(is_prior, weight, 1.0)).mean()


def test_the_two_normalisations():
    losses, is_prior = torch.rand(6), torch.arange(6) >= 3
    total = PriorConfig(weight=0.3, normalisation="sum")
    torch.testing.assert_close(combined(losses[:3], losses[3:], total), as_diffusers(losses, 0.3))
    mean = PriorConfig(weight=0.3, normalisation="mean")
    torch.testing.assert_close(combined(losses[:3], losses[3:], mean), as_kohya(losses, is_prior, 0.3))
    one, two = torch.tensor([1.0]), torch.tensor([2.0, 4.0])  # unequal numbers: more than a factor of 2
    assert float(combined(one, two, total)) == pytest.approx(1 + 0.3 * 3)
    assert float(combined(one, two, mean)) == pytest.approx((1 + 0.3 * 6) / 3)


@pytest.mark.parametrize("normalisation", ["sum", "mean"])
def test_the_tasks_loss_is_the_reference(folder, tmp_path, normalisation):
    """Of its own draws, through the network by hand in two passes, with 4 pictures of the subject and 2 of the class;
    and so are its gradients."""
    more = [*PRIOR, "prior.weight=0.5", "prior.batch=2", f"prior.normalisation={normalisation}"]
    task = task_of("dreambooth", folder, tmp_path, *more, "train_text=false")
    loss, told = task.loss(0, 0)
    (others, named), rows, more_rows = task.class_set, task._rows(0, 0), task._class_rows(0, 0)
    assert (len(rows), len(more_rows), named) == (4, 2, ["a dog"] * 3)
    of_subject = task._draw(task.data, rows, "train", 0, 0)
    of_class = task._draw(others, more_rows, "class", 0, 0)
    noise = torch.cat([of_subject[2], of_class[2]])
    losses = []
    for (x0, t, _), own, prompt in zip(
        (of_subject, of_class), noise.split([4, 2]), ("a sks dog", "a dog"), strict=True
    ):
        context = task.base.encode_prompts([prompt] * len(x0))
        losses.append(
            diffusion_loss(
                lambda x, t, c=context: task.unet(x, t, c), x0, t, own, task.schedule, LossConfig()
            )
        )
    if normalisation == "sum":
        wanted = losses[0].mean() + 0.5 * losses[1].mean()
    else:
        wanted = as_kohya(torch.cat(losses), torch.arange(6) >= 4, 0.5)
    torch.testing.assert_close(loss, wanted, atol=1e-5, rtol=1e-5)
    assert told["prior"] == pytest.approx(float(losses[1].mean().detach()), abs=1e-5)
    ours, theirs = (torch.autograd.grad(each, task.unet.conv_in.weight)[0] for each in (loss, wanted))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


HOW = {"seed": 1, "steps": 2, "guidance": 3.0}


def pictures(folder, cache, **more):
    config = PriorConfig(**{"weight": 1.0, "count": 11, **HOW, **more})
    how = (32, cache, str(folder / "model"), "a hash", "cpu")
    return class_pictures(config, ["a dog", "a cat"], *how)


def test_class_pictures_are_the_frozen_models_and_are_made_once(folder, tmp_path, monkeypatch):
    pixels, captions = pictures(folder, tmp_path)
    assert captions[:3] == ["a dog", "a cat", "a dog"]
    plain = Pipeline.load(folder / "model", device="cpu")
    made = plain.txt2img(captions, batch=8, size=(32, 32), sampler="ddim", **HOW)
    assert [picture.tobytes() for picture in to_pil(made)] == [
        picture.permute(1, 2, 0).contiguous().numpy().tobytes() for picture in pixels
    ]
    [made_in] = tmp_path.iterdir()
    assert read_parameters(made_in / "00003.png")["prompt"] == "a cat"
    (made_in / "00009.png").unlink()
    first = (made_in / "00000.png").stat().st_mtime_ns
    again, _ = pictures(folder, tmp_path)
    assert torch.equal(again, pixels)
    assert (made_in / "00000.png").stat().st_mtime_ns == first  # only the batch that lacked one was made
    monkeypatch.setattr(train.prior.Pipeline, "load", None)
    assert torch.equal(pictures(folder, tmp_path)[0], pixels)
    assert torch.equal(pictures(folder, tmp_path, count=4)[0], pixels[:4])
    with pytest.raises(TypeError):  # of another seed they would have to be made
        pictures(folder, tmp_path, seed=2)


def test_ranks_make_each_their_share(folder, tmp_path, monkeypatch):
    alone, _ = pictures(folder, tmp_path / "one")
    monkeypatch.setattr(train.prior, "share", lambda count, batch: range(8))
    with pytest.raises(ValueError, match="00008.png: no such file"):  # the other rank's are not there yet
        pictures(folder, tmp_path / "two")
    monkeypatch.setattr(train.prior, "share", lambda count, batch: range(8, 11))
    assert torch.equal(pictures(folder, tmp_path / "two")[0], alone)


def test_given_pictures_of_the_class_in_place_of_made_ones(folder, tmp_path, monkeypatch):
    own = tmp_path / "class"
    shutil.copytree(folder / "pictures", own)
    (own / "1.txt").write_text("a dog that sits")
    monkeypatch.setattr(train.prior, "make_missing", None)
    task = task_of("lora", folder, tmp_path / "out", *PRIOR, f"prior.path={own}", "prior.count=3")
    data, captions = task.class_set
    assert captions == ["a dog", "a dog that sits", "a dog"]
    assert len(data) == 3
    loss, _ = task.loss(0, 0)
    assert bool(loss.isfinite())


def test_making_them_changes_no_draw_of_the_run(folder, tmp_path, monkeypatch):
    """A run that finds its class pictures made draws the same dropout as the one that made them, even where
    reading a model takes random numbers."""
    load = Pipeline.load
    monkeypatch.setattr(train.prior.Pipeline, "load", lambda *a, **k: (torch.rand(3), load(*a, **k))[1])
    more = [*PRIOR, "lora.dropout=0.5", "prior.batch=4"]
    losses = []
    for _ in range(2):
        task = task_of("lora", folder, tmp_path, *more)
        for lora in task.loras.values():
            for adapter in lora.adapters.values():
                torch.nn.init.normal_(adapter.up)
        torch.manual_seed(0)
        losses.append(float(task.loss(0, 0)[0].detach()))
    assert losses[0] == losses[1]
