"""`ldm-train personalise`: three ways to learn a subject, compared; with models of random weights."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml
from personal import RUN, make

from sample.images import read_rgb
from train import ablate, judging, personalise
from train.__main__ import main
from train.ablation_table import Arm, Result
from train.judging import Asked, Judge, name_of

ARMS = {
    "inversion": {
        "task": "textual-inversion",
        "config": "configs/train/emoji_textual_inversion.yaml",
        "overrides": ["tokens.starts=[dog]"],
    },
    "dreambooth": {
        "task": "dreambooth",
        "config": "configs/train/emoji_dreambooth.yaml",
        "overrides": ["subject.noun=dog", "prior.weight=0.0", "run.lr=0.01"],
    },
    "lora": {
        "task": "lora",
        "config": "configs/train/emoji_lora.yaml",
        "overrides": ["subject.noun=dog", "lora.rank=2", "lora_text.rank=2", "run.lr=0.05"],
    },
}
EVALUATE = {
    "prompts": ["a {} in snow"],
    "class_prompts": ["a {}"],
    "others": ["a cat", "a red apple", "a key"],
    "each": 2,
    "features": "thumbnails",
    "steps": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("personalise"))


def study(folder: Path, path: Path, **changes: object) -> Path:
    """A study's YAML at `path`."""
    values = {
        "pictures": str(folder / "pictures"),
        "model": str(folder / "model"),
        "noun": "dog",
        "images": 8,
        "seeds": [0],
        "common": [each for each in RUN if not each.startswith("run.steps")],
        "arms": ARMS,
        "evaluate": EVALUATE,
    }
    path.write_text(yaml.safe_dump({**values, **changes}))
    return path


def values_of(out: Path, run: str) -> dict[str, float]:
    return json.loads((out / run / judging.JUDGED).read_text())["values"]


def test_the_whole_study_and_again(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Table and figure of all arms; a second call computes nothing; one answer lost is one answer found."""
    out, config = tmp_path / "out", str(study(folder, tmp_path / "study.yaml"))
    assert main(["personalise", config, "--out", str(out)]) == 0
    table = (out / "table.md").read_text()
    assert capsys.readouterr().out.startswith("| arm | seeds | similarity | rise | drift | parameters | s | ")
    for arm in ("base (asked for the class)", *ARMS):
        assert table.count(f"| {arm} |") == 1
    assert f"ldm-train personalise {config}" in table
    assert "the picture at 8x8" in table
    figure = (out / "figure.svg").read_text()
    assert figure.count('r="3"') == 2 * (1 + len(ARMS))  # a ring a run, for similarity and drift
    assert len((out / "runs.csv").read_text().splitlines()) == 1 + len(ARMS)
    assert abs(values_of(out, "base")["drift"]) < 1e-6
    for arm in ARMS:
        log = (out / arm / "seed-0" / "log.jsonl").read_text().splitlines()
        assert max(json.loads(line).get("step", 0) for line in log) == 2  # 8 pictures, 4 at once
        assert (out / arm / "seed-0" / "subject.png").is_file()
    assert abs(values_of(out, "inversion/seed-0")["drift"]) < 1e-6  # a new word changes no other
    assert values_of(out, "dreambooth/seed-0")["drift"] > 1e-4
    assert values_of(out, "lora/seed-0")["drift"] > 1e-4

    before = values_of(out, "lora/seed-0")
    monkeypatch.setattr(ablate, "train", lambda *_: pytest.fail("trained again"))
    (out / "lora" / "seed-0" / judging.JUDGED).unlink()
    assert main(["personalise", config, "--out", str(out), "--table-only"]) == 0
    assert "| lora |" not in (out / "table.md").read_text()
    assert main(["personalise", config, "--out", str(out)]) == 0
    assert values_of(out, "lora/seed-0") == before
    monkeypatch.setattr(judging.Judge, "_answer", lambda *_: pytest.fail("asked again"))
    assert main(["personalise", config, "--out", str(out)]) == 0
    assert (out / "table.md").read_text() == table


def test_the_measures_by_hand(folder: Path) -> None:
    """Similarity of the subject's own pictures is that among them; drift of the same pictures is 0."""
    asked = Asked(**{key: tuple(v) if isinstance(v, list) else v for key, v in EVALUATE.items()})
    judge = Judge(str(folder / "model"), str(folder / "pictures"), "dog", asked)
    own = [read_rgb(path, 32) for path in sorted((folder / "pictures").iterdir())]
    features = judge.extractor.look(own)[0] - judge.zero
    by_hand = torch.nn.functional.cosine_similarity(features[:, None], features[None], dim=2)
    judge.size = 32  # the model's own is 64
    torch.testing.assert_close(judge._directions(own) @ judge.subject.T, by_hand)


def test_table_and_rise_by_hand() -> None:
    """Two seeds: mean and interval; the rise over the base, in shares of it too where that means something."""
    results = {seed: Result({"similarity": s, "drift": 0.5}, 1234, 60.0) for seed, s in ((0, 0.5), (1, 0.7))}
    sizes = {"lora": 679_144}
    for base, rise in ((0.25, "+0.350 (+140%)"), (-0.25, "+0.850")):
        table = personalise.markdown(
            {"similarity": base, "drift": 0.0}, [Arm("lora", "", results)], sizes
        ).splitlines()
        assert table[2] == f"| base (asked for the class) |  | {base:.3f} |  | 0.000 | 0 |  |  |"
        assert table[3] == f"| lora | 2 | 0.6 ± 1.3 | {rise} | 0.5 ± 0 | 1,234 | 60 | 679 kB |"


@pytest.mark.parametrize("arm", ARMS)
def test_the_name_in_prompts(folder: Path, tmp_path: Path, arm: str) -> None:
    given = personalise.load_config(personalise.Study, study(folder, tmp_path / "study.yaml"))
    [config] = [run.config for run in personalise.plan(given, tmp_path) if (run.arm, run.seed) == (arm, 0)]
    assert name_of(config) == {"inversion": "<subject>"}.get(arm, "sks dog")


def test_fidelity_only_where_a_set_is_given(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Asked(**{key: tuple(v) if isinstance(v, list) else v for key, v in EVALUATE.items()})
    monkeypatch.setattr(judging, "fidelity", lambda pipe, data, questions, guidance: 0.25)
    for data, names in (("", {"similarity", "drift"}), ("x", {"similarity", "drift", "fidelity"})):
        out = tmp_path / (data or "none")
        told = dataclasses.replace(asked, data=data)
        Judge(str(folder / "model"), str(folder / "pictures"), "dog", told).base(out)
        assert set(values_of(tmp_path, out.name)) == names


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"arms": {}}, "at least one"),
        ({"arms": {"base": ARMS["lora"]}}, "none is called 'base'"),
        ({"arms": {"a": {**ARMS["lora"], "task": "hypernetwork"}}}, "textual-inversion, dreambooth, lora"),
        ({"arms": {"a": {**ARMS["lora"], "overrides": ["run.steps=9"]}}}, "the study sets"),
        ({"seeds": [1, 1]}, "different numbers"),
        ({"evaluate": {**EVALUATE, "prompts": ["a dog"]}}, "has no {}"),
        ({"evaluate": {**EVALUATE, "others": []}}, "at least one prompt"),
        ({"evaluate": {**EVALUATE, "features": "clip"}}, "hed, hed:FILE"),
        ({"pictures": "/nowhere"}, "/nowhere"),
    ],
)
def test_mistakes_are_one_line(
    folder: Path, tmp_path: Path, changes: dict, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = study(folder, tmp_path / "study.yaml", **changes)
    assert main(["personalise", str(config), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in error
    assert not (tmp_path / "out" / "table.md").exists()


def test_another_configuration_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What an --out holds of another study is not taken for this one's."""
    arms = {"lora": ARMS["lora"]}
    out = ["--out", str(tmp_path / "out")]
    one = str(study(folder, tmp_path / "one.yaml", arms=arms, seeds=[0]))
    two = str(study(folder, tmp_path / "two.yaml", arms=arms, seeds=[0], images=12))
    assert main(["personalise", one, *out]) == 0
    assert main(["personalise", two, *out]) == 2
    assert "run.steps" in capsys.readouterr().err


def test_no_finished_run_to_tell_of(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(study(folder, tmp_path / "study.yaml"))
    assert main(["personalise", config, "--out", str(tmp_path / "out"), "--table-only"]) == 2
    assert "holds no finished run" in capsys.readouterr().err


def test_the_shipped_study_is_sound() -> None:
    given = personalise.load_config(personalise.Study, "configs/ablations/personalise.yaml")
    runs = personalise.plan(given, Path("out"))
    assert {run.config.run.steps * run.config.run.batch for run in runs} == {given.images}
    assert {Path(run.config.data.path).name for run in runs} == {"creature"}
    assert len(list(Path(given.pictures).glob("*.png"))) == 5
