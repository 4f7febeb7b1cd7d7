"""`ldm-sample evaluate` on sets made so that the answer is known, and the measures it is built of."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from ldm.metrics import distances, nearest_ranks, psnr, thumbnails
from ldm.models.lora import LoRAConfig, add_lora
from ldm.weights.embeddings import Embedding, write_embeddings
from ldm.weights.lora_writing import write_lora
from sample.__main__ import main
from sample.images import read_parameters, to_pil
from sample.pipeline import Pipeline
from sample.questions import Picture, Question, pick, read_images, read_rows

CONCEPTS = 30
STYLES = ("ink", "oil")

# --- measures -----------------------------------------------------------------------------------------------


def test_psnr_in_closed_form() -> None:
    images = torch.zeros(3, 3, 4, 4)
    off = torch.stack([images[0] + 0.2, images[1] + 1, images[2]])
    assert_close(psnr(images, off)[:2], torch.tensor([20.0, 6.0206]), atol=1e-4, rtol=0)
    assert psnr(images, off)[2] > 100
    assert_close(psnr(images + 1, images + 5), psnr(images, images))  # both clamped to 1


def test_thumbnails_are_area_means() -> None:
    images = torch.arange(2 * 3 * 4 * 4, dtype=torch.float32).reshape(2, 3, 4, 4)
    small = thumbnails(images, side=2).reshape(2, 3, 2, 2)
    assert_close(small[1, 2, 0, 1], images[1, 2, :2, 2:].mean())


def test_distances() -> None:
    a, b = torch.tensor([[0.0, 0.0], [3.0, 1.0]]), torch.tensor([[0.0, 2.0], [3.0, 1.0], [0.0, 0.0]])
    expected = torch.tensor([[2**0.5, 5**0.5, 0.0], [5**0.5, 0.0, 5**0.5]])
    assert_close(distances(a, b), expected)


def test_ranks() -> None:
    distance = torch.tensor([0.3, 0.1, 0.2, 0.1, 0.4]).expand(5, 5)
    right = torch.eye(5, dtype=torch.bool)
    everything = torch.ones(5, 5, dtype=torch.bool)
    # Candidates 1 and 3 are equally near: either is right.
    assert nearest_ranks(distance, everything, right).tolist() == [3, 0, 2, 0, 4]
    without_1 = everything.clone()
    without_1[:, 1] = False
    assert nearest_ranks(distance, without_1, right).tolist() == [2, 5, 1, 0, 3]


# --- a set with a known answer ------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Noise pictures of 30 concepts in two styles, the second style of the last 10 held out.

    The styles differ a little, so that the real picture of a held-out pair is nearest to the other style's.
    """
    rng = np.random.default_rng(0)
    rows = []
    for i in range(CONCEPTS):
        pixels = rng.integers(10, 246, (32, 32, 3))
        for k, style in enumerate(STYLES):
            name = f"{style}/{i:02d}.png"
            (tmp_path / "set" / style).mkdir(parents=True, exist_ok=True)
            Image.fromarray((pixels + 10 * k).astype(np.uint8)).save(tmp_path / "set" / name)
            split = "heldout_pair" if k and i >= CONCEPTS - 10 else "train"
            text = f"a thing {i}, {style}"
            rows.append(
                {"file_name": name, "text": text, "concept": f"thing {i}", "style": style, "split": split}
            )
    rows.append(rows[0] | {"split": "heldout_image"})
    (tmp_path / "set" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return tmp_path / "set"


def evaluate(data: Path, model: Path, *arguments: str) -> int:
    options = {"--data": data, "--model": model, "--out": data.parent / "out", "--device": "cpu"}
    return main(["evaluate", *(str(x) for option in options.items() for x in option), *arguments])


def results(data: Path) -> dict[str, Any]:
    return json.loads((data.parent / "out" / "evaluation.json").read_text())


def pretending(data: Path, shift: int, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Make every pipeline return the real picture `shift` concepts after the caption's; lists its calls."""
    rows = read_rows(data)
    known = {row.text: image for row, image in zip(rows, read_images(data, rows, 32), strict=True)}
    calls: list[dict[str, Any]] = []

    def txt2img(self: Pipeline, prompts: list[str], **options: Any) -> Tensor:
        calls.append(options)
        options["progress"](1, 1)
        chosen = []
        for prompt in prompts:
            number = int(prompt.split(",")[0].removeprefix("a thing "))
            chosen.append(known[f"a thing {(number + shift) % CONCEPTS}, {prompt.split(', ')[1]}"])
        return torch.stack(chosen)

    monkeypatch.setattr(Pipeline, "txt2img", txt2img)
    return calls


def test_the_training_pictures_themselves_are_all_right(
    data: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = pretending(data, 0, monkeypatch)
    assert evaluate(data, model, "--captions", "40", "--guidance", "3", "--seed", "5", "--steps", "7") == 0
    found = results(data)["results"]
    assert found["train"] == pytest.approx(
        {"count": 40, "right": 1.0, "real": 1.0, "median_rank": 0.0, "chance": found["train"]["chance"]}
    )
    assert 1 / 30 <= found["train"]["chance"] <= 1 / 20  # 30 training pictures in ink, 20 in oil
    assert found["heldout_pair"] == pytest.approx(
        {"count": 10, "right": 1.0, "real": 1.0, "median_rank": 0.0, "chance": 1 / 30}
    )
    assert [(call["seed"], call["steps"], call["guidance"]) for call in calls] == [(5, 7, 3.0)] * 2
    told = capsys.readouterr().out
    assert "training captions     100.0%" in told
    assert "held-out pairs        100.0%    3.33%  100.0%        10" in told
    settings = results(data)["settings"]
    for key in (
        "data",
        "model",
        "captions",
        "steps",
        "guidance",
        "seed",
        "weights",
        "versions",
        "sampler",
        "size",
    ):
        assert key in settings
    sheet = data.parent / "out" / "evaluation-0000.png"
    assert read_parameters(sheet) == settings
    width = 16 * 34 + 2
    assert Image.open(sheet).size == (width, 7 * 34 + 2)  # (40 + 10) pairs, 8 a row
    pair = np.array(Image.open(sheet))[2:34, 2:68]
    assert np.array_equal(pair[:, :32], pair[:, 34:])  # beside each picture its nearest: itself


def test_only_the_concepts_of_the_config_are_asked_for(
    data: Path, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretending(data, 0, monkeypatch)
    config = tmp_path / "config.yaml"
    config.write_text("data:\n  path: x\n  concepts: [thing 1, thing 29]\n")
    assert evaluate(data, model, "--config", str(config)) == 0
    found = results(data)["results"]
    assert found["train"]["count"] == 3  # thing 1 in both styles, thing 29 in ink alone
    assert found["heldout_pair"]["count"] == 1
    assert found["train"]["chance"] < 1 / 15  # compared with the whole set all the same


def test_pictures_of_other_concepts_are_all_wrong(
    data: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretending(data, 1, monkeypatch)
    assert evaluate(data, model, "--captions", "1000") == 0
    found = results(data)["results"]
    assert (found["train"]["count"], found["train"]["right"]) == (50, 0.0)
    assert (found["heldout_pair"]["right"], found["heldout_pair"]["real"]) == (0.0, 1.0)
    assert found["train"]["median_rank"] >= 1


def test_blind_pictures_are_about_chance() -> None:
    count = 400
    rows = [Picture(f"{i}.png", f"{i}", f"{i}", "ink", "train") for i in range(count)]
    everything = list(range(count))
    images = torch.rand(count, 3, 16, 16) * 2 - 1
    question = Question.ask("train", rows, everything, everything, same_style=True)
    fidelity, nearest = question.measure(images, images[torch.randperm(count)])
    assert fidelity.chance == pytest.approx(1 / count)
    assert fidelity.right <= 6 / count  # a Poisson number around 1: above 6 once in 10000
    assert count / 4 < fidelity.median_rank < 3 * count / 4
    assert sorted(nearest) == everything


def test_a_tiny_model_end_to_end(
    data: Path, model: Path, pipe: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(data, model, "--captions", "3", "--steps", "1", "--batch", "4") == 0
    image = read_images(data, read_rows(data)[-1:], 32)
    expected = psnr(image, pipe.autoencoder.decode(pipe.autoencoder.encode(image).mode()))
    assert results(data)["results"]["heldout_psnr"] == pytest.approx(float(expected), abs=1e-4)
    assert f"autoencoder PSNR{float(expected):25.2f} dB" in capsys.readouterr().out


def test_an_adapted_model(
    data: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The pictures are those of the model with them, by hand; both are recorded, and nothing else changes."""
    pipe = Pipeline.load(model, "cpu")
    lora = add_lora(pipe.unet, LoRAConfig(rank=2))
    for adapter in lora.adapters.values():
        torch.nn.init.normal_(adapter.up.data)
    write_lora({"unet": lora.weights}, tmp_path / "style.safetensors", {"unet": pipe.unet.config})
    lora.set_scale(0.7)
    write_embeddings(tmp_path / "word.safetensors", [Embedding("a thing", torch.randn(2, 16))])
    pipe.add_embedding(tmp_path / "word.safetensors")
    few = ("--captions", "3", "--steps", "1", "--batch", "4", "--seed", "3")
    asked = [f"--lora={tmp_path / 'style.safetensors'}:0.7", f"--embedding={tmp_path / 'word.safetensors'}"]
    sheets, settings = [], []
    for more in ([], asked):
        assert evaluate(data, model, *few, *more) == 0
        sheets.append(np.array(Image.open(data.parent / "out" / f"evaluation-{len(sheets):04}.png")))
        settings.append(results(data)["settings"])
    plain, adapted = settings
    told = {name: adapted.pop(name) for name in ("lora", "embedding", "lora_hashes", "embedding_hashes")}
    assert plain == adapted
    assert told["lora"] == [asked[0].removeprefix("--lora=")]
    assert ([*told["lora_hashes"]], [*told["embedding_hashes"]]) == (["style"], ["a thing"])
    assert "no prompt says" not in capsys.readouterr().err
    rows = read_rows(data)
    taught = [i for i, row in enumerate(rows) if row.split == "train"]
    prompts = [rows[i].text for i in pick(taught, 3, 3)]
    expected = to_pil(pipe.txt2img(prompts, seed=3, steps=1, guidance=4.0))
    for i, picture in enumerate(expected):
        assert np.array_equal(sheets[1][2:34, 2 + 68 * i : 34 + 68 * i], np.array(picture))
        assert not np.array_equal(sheets[0][2:34, 2 + 68 * i : 34 + 68 * i], np.array(picture))
    line = ["evaluate", "--real", "a", "--fake", "b", "--features", "thumbnails", asked[0]]
    assert main(line) == 2
    assert "--lora and --embedding change a model" in capsys.readouterr().err
    assert evaluate(data, model, f"--lora={tmp_path / 'word.safetensors'}") == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_set_without_anything_held_out(
    data: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row for row in (data / "metadata.jsonl").read_text().split("\n") if '"train"' in row]
    (data / "metadata.jsonl").write_text("\n".join(rows))
    pretending(data, 0, monkeypatch)
    assert evaluate(data, model) == 0
    assert capsys.readouterr().out.count("none in the data") == 2
    found = results(data)["results"]
    assert (found["heldout_pair"], found["heldout_psnr"]) == (None, None)


def test_captions_are_a_function_of_the_seed() -> None:
    rows = list(range(100, 200))
    assert pick(rows, 20, 1) == pick(rows, 20, 1)
    assert pick(rows, 20, 1) != pick(rows, 20, 2)
    assert pick(rows, 20, 1) == pick(rows, 50, 1)[:20]
    assert sorted(pick(rows, 1000, 1)) == rows


@pytest.mark.parametrize(("line", "message"), [
    ("{", "line 2: expected a JSON object with the texts file_name, text, concept, style, split"),
    ("[1]", "line 2: expected a JSON object"),
    ('{"file_name": "a.png", "text": "a"}', "line 2: expected a JSON object"),
    ('{"file_name": "ink/00.png", "text": "a", "concept": 1, "style": "b", "split": "train"}', "line 2:"),
    ('{"file_name": "ink/x.png", "text": "a", "concept": "c", "style": "b", "split": "train"}',
     "x.png: no such file"),
    ('{"file_name": "ink/00.png", "text": "a", "concept": "new", "style": "oil", "split": "heldout_pair"}',
     "ink/00.png: no training picture of its concept 'new'"),
])  # fmt: skip
def test_faulty_data_is_named(
    data: Path, model: Path, monkeypatch: pytest.MonkeyPatch, line: str, message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    whole = (data / "metadata.jsonl").read_text().split("\n")
    (data / "metadata.jsonl").write_text("\n".join([whole[0], line, *whole[1:]]))
    monkeypatch.delattr(Pipeline, "txt2img")  # nothing is sampled before all is checked
    assert evaluate(data, model, "--captions", "2") == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert not (data.parent / "out").exists()


def test_data_that_is_no_folder_of_ours(data: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(data / "ink", model) == 2
    assert "metadata.jsonl does not exist; --data is a folder" in capsys.readouterr().err
    assert evaluate(data, model, "--captions", "0") == 2
    assert "--captions must be at least 1, got 0" in capsys.readouterr().err


# --- two sets of pictures -----------------------------------------------------------------------------------


def test_the_training_pictures_as_samples(
    data: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Equal sets: no distance, all covered, every sample is a repetition; and the file says by what measure."""
    pytest.importorskip("torchmetrics")
    pretending(data, 0, monkeypatch)
    with_features = ["--captions", "50", "--features", "thumbnails", "--feature-size", "4", "--batch", "7"]
    assert evaluate(data, model, *with_features) == 0
    found, settings = results(data)["results"], results(data)["settings"]
    samples = found["distribution"]["samples"]
    assert samples["frechet"] == pytest.approx(0, abs=1e-6)
    assert (samples["precision"], samples["recall"], samples["counts"]) == (1.0, 1.0, [50, 50])
    assert found["distribution"]["ideal"] is None  # 50 pictures are too few to set 50 aside
    assert "50 pictures for 48 features" in found["distribution"]["doubts"][0]
    repeated = found["memorisation"]["train"]
    assert (repeated["samples"]["median"], repeated["samples"]["below"]) == (0, 1)
    assert repeated["real"]["smallest"] > 0 and repeated["against"].startswith("training pictures")
    assert found["memorisation"]["heldout_pair"]["samples"]["count"] == 10
    assert settings["features"]["name"] == "thumbnails"
    assert "not comparable with published FIDs" in settings["features"]["what"]
    assert settings["reference"]["count"] == 50 and len(settings["reference"]["sha256"]) == 64
    assert "4x4" in settings["resize"] and settings["feature_size"] == 4
    told = capsys.readouterr().out
    assert "seen by the picture at 4x4, no network" in told and "Fréchet distance" in told
    sheet = Image.open(data.parent / "out" / "nearest-train-0000.png")
    assert sheet.size == (8 * 34 + 2, 8 * 34 + 2)  # the 32 nearest of 50 pairs, four a row
    pair = np.array(sheet)[2:34, 2:68]
    assert np.array_equal(pair[:, :32], pair[:, 34:])
    assert (data.parent / "out" / "nearest-heldout_pair-0000.png").exists()


def test_without_features_nothing_of_it_is_said(
    data: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretending(data, 0, monkeypatch)
    monkeypatch.setattr("sample.evaluate.require_torchmetrics", lambda: pytest.fail("is not needed"))
    assert evaluate(data, model, "--captions", "3") == 0
    assert set(results(data)["results"]) == {"train", "heldout_pair", "heldout_psnr"}
    assert not {"features", "feature_size", "real", "fake", "reference"} & set(results(data)["settings"])
    assert not list((data.parent / "out").glob("nearest*"))


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """40 noise pictures of different sizes, and 20 samples: 5 copies of those, 15 darker ones."""
    rng = np.random.default_rng(1)
    real, fake = tmp_path / "real", tmp_path / "fake"
    real.mkdir()
    fake.mkdir()
    for i in range(40):
        pixels = rng.integers(0, 256, (8 + i % 3, 8 + i % 2, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(real / f"{i:02d}.png")
        if i < 20:
            Image.fromarray(pixels if i < 5 else pixels // 4).save(fake / f"{i:02d}.png")
    return real, fake


def compare(real: Path, fake: Path, *arguments: str) -> int:
    where = ["--real", str(real), "--fake", str(fake), "--out", str(real.parent / "out"), "--device", "cpu"]
    return main(["evaluate", *where, *arguments])


def comparison(real: Path) -> dict[str, Any]:
    return json.loads((real.parent / "out" / "comparison.json").read_text())


def test_two_folders_without_a_model(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torchmetrics")
    monkeypatch.setattr("sample.evaluate.load_pipeline", lambda args: pytest.fail("no model is needed"))
    thumbnails = ["--features", "thumbnails", "--feature-size", "2"]
    assert compare(*folders, *thumbnails) == 0
    found = comparison(folders[0])
    samples, best = found["results"]["distribution"]["samples"], found["results"]["distribution"]["ideal"]
    assert (samples["counts"], best["counts"]) == ([40, 20], [20, 20])
    assert samples["frechet"] > 2 * best["frechet"] and samples["kid"] > best["kid"]
    assert samples["precision"] == 0.25 < best["precision"]  # the copies
    repeated = found["results"]["memorisation"]["samples"]
    assert repeated["samples"]["below"] == pytest.approx(0.25, abs=0.01)  # the copies
    settings = found["settings"]
    assert (settings["reference"]["count"], settings["samples"]["count"]) == (40, 20)
    assert str(folders[0]) == settings["real"] and "model" not in settings
    assert "nearest-0000.png" in capsys.readouterr().out
    assert read_parameters(folders[0].parent / "out" / "nearest-0000.png") == settings

    assert compare(*folders, *thumbnails) == 0  # once more: the same file, bit for bit
    assert comparison(folders[0]) == found
    for path in list(folders[0].iterdir()):  # other names and order: the same hash
        path.rename(path.with_name(f"x{99 - int(path.stem)}.png"))
    assert compare(*folders, *thumbnails) == 0
    assert comparison(folders[0])["settings"]["reference"] == settings["reference"]
    Image.new("RGB", (9, 9)).save(folders[0] / "one more.png")
    assert compare(*folders, *thumbnails) == 0
    assert comparison(folders[0])["settings"]["reference"]["sha256"] != settings["reference"]["sha256"]


@pytest.mark.parametrize(("arguments", "message"), [
    (["--real", "REAL"], "--real DIR and --fake DIR go together, and without --data"),
    (["--real", "REAL", "--fake", "FAKE", "--data", "REAL"], "go together, and without --data"),
    (["--real", "REAL", "--fake", "FAKE"], "--real and --fake need --features hed"),
    (["--real", "REAL", "--fake", "NONE", "--features", "thumbnails"], "nowhere: no such folder"),
    (["--real", "REAL", "--fake", "FEW", "--features", "thumbnails"], "9 samples are too few to compare two sets"),
    (["--real", "TORN", "--fake", "FAKE", "--features", "thumbnails"], "torn.png: unreadable image"),
    (["--real", "REAL", "--fake", "FAKE", "--features", "vgg"], "--features 'vgg' is not known"),
    (["--data", "REAL", "--feature-size", "64"], "--feature-size needs --features hed"),
    ([], "evaluate needs --data DIR, or --real DIR and --fake DIR"),
])  # fmt: skip
def test_faulty_comparisons_are_one_line(
    folders: tuple[Path, Path], tmp_path: Path, arguments: list[str], message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    pytest.importorskip("torchmetrics")
    real, fake = folders
    places = {"REAL": real, "FAKE": fake, "NONE": tmp_path / "nowhere"}
    for name in ("FEW", "TORN"):
        places[name] = tmp_path / name
        shutil.copytree(real, places[name])
    for path in sorted(places["FEW"].iterdir())[9:]:
        path.unlink()
    (places["TORN"] / "torn.png").write_bytes((real / "00.png").read_bytes()[:60])
    command = [str(places.get(argument, argument)) for argument in arguments]
    assert main(["evaluate", "--out", str(tmp_path / "out"), *command]) == 2
    told = capsys.readouterr().err.strip().split("\n")[-1]
    assert message in told and told.startswith("ldm-sample: error: ")
    assert not (tmp_path / "out").exists()


def test_too_few_captions_to_compare(
    data: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torchmetrics")
    monkeypatch.delattr(Pipeline, "txt2img")  # nothing is sampled before this is known
    assert evaluate(data, model, "--captions", "9", "--features", "thumbnails") == 2
    assert "9 samples are too few to compare two sets; at least 10" in capsys.readouterr().err
