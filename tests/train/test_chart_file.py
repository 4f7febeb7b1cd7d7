"""`ldm-train report --chart`: an SVG of its own with the curves that were asked for."""

import json
import xml.etree.ElementTree as ElementTree

import pytest

from train.__main__ import main


@pytest.fixture
def runs(tmp_path):
    for name, factor in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        rows = [{"step": step, "control_error": factor * 8 / step, "loss": 1.0} for step in (1, 2, 4, 8)]
        rows[-1]["uncontrolled_error"] = 3.0
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def report(runs, *more):
    return main(["report", str(runs / "a"), *more, "--out", str(runs / "chart.svg")])


def test_the_curves_that_were_asked_for(runs):
    assert report(runs, "--chart", "control_error,uncontrolled_error") == 0
    root = ElementTree.parse(runs / "chart.svg").getroot()
    texts = ["".join(each.itertext()) for each in root.iter() if each.tag.endswith("text")]
    assert texts[:2] == ["control error", "uncontrolled error"] and "step" in texts
    lines = [each.get("points").split() for each in root.iter() if each.tag.endswith("polyline")]
    assert [len(line) for line in lines] == [4, 1]
    heights = [float(point.split(",")[1]) for point in lines[0]]
    assert heights == sorted(heights) and heights[0] < heights[-1]  # falls: y grows downwards
    titles = ["".join(each.itertext()) for each in root.iter() if each.tag.endswith("title")]
    assert "control_error, step 4: 2" in titles


def test_several_runs_have_their_names(runs):
    assert report(runs, str(runs / "b"), "--chart", "control_error") == 0
    text = (runs / "chart.svg").read_text()
    assert "a: control error" in text and "b: control error" in text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--chart", "control_eror"], "no run has logged it; did you mean control_error?"),
        (["--chart", "loss", "--out", "x.png"], "give a name that ends in .svg"),
    ],
)
def test_mistakes(runs, capsys, more, message):
    assert main(["report", str(runs / "a"), "--out", str(runs / "chart.svg"), *more]) == 2
    assert message in capsys.readouterr().err and not (runs / "chart.svg").exists()
