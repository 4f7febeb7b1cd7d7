"""The page that `ldm-train report` draws: what is on it, the arithmetic of curves and axes, and bad folders."""

import base64
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from train.__main__ import main
from train.curves import (
    DRAWN,
    Axis,
    axis_of,
    read_log,
    read_run,
    read_runs,
    smooth,
    thinned,
)
from train.report_page import page, write_report


def make_run(folder, *, factor=1.0, rows=20, preview=True, **config):
    """A run folder: a loss that falls, a validation, a preview of its own colour."""
    folder.mkdir(parents=True)
    lines = []
    for step in range(10, 10 * rows + 1, 10):
        lines.append(
            {"step": step, "loss": factor * 2 / step, "gradient": 0.5, "images_per_second": 40.0, "lr": 1e-3}
        )
        if step % 50 == 0:
            lines.append({"step": step, "validation_loss": factor * 3 / step})
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = {"out": str(folder), "steps": 400, "batch": 8, "lr": 0.001, **config}
    text = "run:\n" + "".join(f"  {key}: {json.dumps(value)}\n" for key, value in run.items())
    (folder / "config.yaml").write_text(text + "caption_dropout: 0.1\n")
    if preview:
        (folder / "previews").mkdir()
        for step in (100, 200):
            Image.new("RGB", (8, 4), (step, 0, 0)).save(folder / "previews" / f"step-{step:08d}.png")
    return folder


class Tags(HTMLParser):
    """Every tag with its attributes; checks that tags are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def named(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


def rows_of(text, title):
    """The cells of the table under a heading, without tags."""
    part = text[text.index(f"<h2>{title}</h2>") :].split("</section>")[0]
    rows = re.findall(r"<tr>(.*?)</tr>", part)
    return [
        [re.sub(r"<[^>]+>", "", cell).strip() for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", row)]
        for row in rows
    ]


@pytest.fixture
def two(tmp_path):
    return [make_run(tmp_path / "first"), make_run(tmp_path / "second", factor=2.0, lr=0.002, seed=1)]


def test_one_page_that_needs_nothing_else(two, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert main(["report", *map(str, two), "--out", str(out)]) == 0
    assert f"wrote {out}" in capsys.readouterr().out
    text = out.read_text()
    tags = Tags(text)
    assert tags.named("script") == tags.named("link") == []
    sources = [attributes["src"] for attributes in tags.named("img")]
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?://|url\(|@import", text)
    assert "prefers-color-scheme:dark" in text


def test_a_chart_for_each_number_of_the_log(two):
    text = page(read_runs(two))
    labels = [
        attributes["aria-label"] for attributes in Tags(text).named("svg") if "aria-label" in attributes
    ]
    assert labels == [
        f"{name} by step" for name in ("loss", "validation_loss", "gradient", "lr", "images_per_second")
    ]


def test_runs_keep_their_colour_and_are_in_the_legend(two):
    text = page(read_runs(two))
    loss = text[text.index('aria-label="loss by step"') :].split("</figure>")[0]
    groups = re.findall(r'<g class="(run\d)">(.*?)</g>', loss)
    assert [name for name, _ in groups] == ["run0", "run1"]
    for _, group in groups:
        assert group.count('<polyline class="raw"') == group.count('<polyline class="line"') == 1
        assert group.count("<circle") == 20
    legend = text[text.index('<p class="legend">') :].split("</p>")[0]
    assert re.findall(r'class="(run\d)".*?</span> (\w+)', legend) == [("run0", "first"), ("run1", "second")]
    assert "first, step 10: 0.2</title>" in loss and "second, step 200: 0.02</title>" in loss


def test_a_curve_stands_where_its_values_are(tmp_path):
    folder = make_run(tmp_path / "run", rows=1)
    (folder / "log.jsonl").write_text(
        '{"step": 0, "loss": 1.0}\n{"step": 50, "loss": 3.0}\n{"step": 100, "loss": 2}\n'
    )
    text = page([read_run(folder, "run")])
    points = re.search(r'<polyline class="line" points="([^"]+)"', text[text.index("loss by step") :])[1]
    (x0, y0), (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in points.split())
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and x0 < x1
    assert y1 < y2 < y0  # up is less
    assert y2 == pytest.approx((y0 + y1) / 2, abs=0.2)
    titles = [float(at) for at in re.findall(r'<text class="y" [^>]+>([^<]+)<', text)]
    assert titles == [1, 1.5, 2, 2.5, 3]


def test_the_newest_preview_of_each_run(two):
    images = [
        base64.b64decode(attributes["src"].split(",")[1])
        for attributes in Tags(page(read_runs(two))).named("img")
    ]
    assert images == [(folder / "previews" / "step-00000200.png").read_bytes() for folder in two]


def test_what_differs_between_the_configurations(two):
    rows = rows_of(page(read_runs(two)), "Configuration")
    assert rows == [["key", "first", "second"], ["run.lr", "0.001", "0.002"], ["run.seed", "", "1"]]


def test_equal_configurations_are_said_to_be_equal(tmp_path):
    folders = [make_run(tmp_path / name) for name in "ab"]
    assert "The runs have the same configuration." in page(read_runs(folders))
    assert "Configuration" not in page(read_runs(folders[:1]))


def test_tables_of_runs_and_of_last_values(two):
    text = page(read_runs(two))
    first = rows_of(text, "Runs")[1]
    assert first == ["first", str(two[0]), "200 of 400", "1,600", "40", "0"]
    assert rows_of(text, "Last values")[1] == ["loss", "0.01", "0.02"]


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    folders = [make_run(tmp_path / place / "run") for place in "ab"]
    assert [run.name for run in read_runs(folders)] == ["a/run", "b/run"]
    assert len(read_runs([folders[0], folders[0]])) == 2  # the same one twice is no reason to stop


def test_a_number_that_one_run_has_alone(tmp_path, two):
    with open(two[1] / "log.jsonl", "a") as file:
        file.write('{"step": 200, "kl": 5.0}\n')
    text = page(read_runs(two))
    assert rows_of(text, "Last values")[-1] == ["kl", "", "5"]
    Tags(text)


def test_skipped_steps_are_counted(two):
    with open(two[0] / "log.jsonl", "a") as file:
        file.write('{"step": 120, "skipped": "model: the loss is nan in step 120"}\n')
    assert read_log(two[0] / "log.jsonl")[1] == 1
    assert rows_of(page(read_runs(two)), "Runs")[1][-1] == "1"


def test_names_are_text_and_no_markup(tmp_path):
    folder = make_run(tmp_path / "a<b>&c", note="<script>alert(1)</script>")
    other = make_run(tmp_path / "plain")
    text = page(read_runs([folder, other]))
    assert Tags(text).named("script") == Tags(text).named("b") == []
    assert "a&lt;b&gt;&amp;c" in text


def test_ten_runs_differ_in_colour_or_dash(tmp_path):
    text = page(read_runs([make_run(tmp_path / f"run{i}", rows=2, preview=False) for i in range(10)]))
    legend = text[text.index('<p class="legend">') :].split("</p>")[0]
    strokes = re.findall(r'class="(run\d)".*?<polyline([^>]*)/>', legend)
    assert len(strokes) == len(set(strokes)) == 10


# --- logs of every kind -------------------------------------------------------------------------------------


def test_a_torn_last_line_is_passed_over(two, tmp_path, capsys):
    with open(two[0] / "log.jsonl", "ab") as file:
        file.write(b'{"step": 210, "lo\xff')
    assert main(["report", str(two[0]), "--out", str(tmp_path / "r.html")]) == 0
    assert f"{two[0] / 'log.jsonl'}: 1 torn line passed over" in capsys.readouterr().err
    assert "1 torn line passed over" in (tmp_path / "r.html").read_text()


def test_values_that_are_not_finite_leave_a_gap(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text(
        '{"step": 1, "loss": NaN}\n{"step": 2, "loss": 1.5, "on": true, "text": "x"}\n{"step": 3, "loss": Infinity}\n'
    )
    assert read_log(log) == ({"loss": [(2.0, 1.5)]}, 0, 0)


def test_rows_out_of_order_and_twice_are_sorted_and_the_last_counts(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 2, "x": 1.0}\n{"step": 1, "x": 2.0}\n{"step": 2, "x": 3.0}\n')
    assert read_log(log)[0] == {"x": [(1.0, 2.0), (2.0, 3.0)]}


def test_a_single_row_and_a_constant_can_be_drawn(tmp_path):
    folder = make_run(tmp_path / "run", rows=1)
    Tags(page([read_run(folder, "run")]))
    (folder / "log.jsonl").write_text('{"step": 0, "loss": 0.0}\n')
    Tags(page([read_run(folder, "run")]))


def test_a_preview_that_is_no_picture_is_left_out(two):
    (two[0] / "previews" / "step-00000300.png").write_text("half")
    run = read_run(two[0], "first")
    assert run.preview.name == "step-00000200.png"
    assert run.notes == [f"{two[0] / 'previews'}: 1 of the files are no PNG"]


def broken_yaml(folder):
    make_run(folder)
    (folder / "config.yaml").write_text("run: [")


BROKEN = {
    "absent": (lambda folder: None, "no such run folder"),
    "empty": (lambda folder: folder.mkdir(), "is not a run folder: it has neither config.yaml nor log.jsonl"),
    "no log": (lambda folder: (make_run(folder) / "log.jsonl").unlink(), "has no log.jsonl"),
    "empty log": (lambda folder: (make_run(folder) / "log.jsonl").write_text(""), "has logged nothing yet"),
    "yaml": (broken_yaml, "not valid YAML"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_bad_folders_are_named_in_one_line_and_nothing_is_written(tmp_path, capsys, case):
    make, told = BROKEN[case]
    make(tmp_path / "run")
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "r.html")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("ldm-train: error: ") and told in line and str(tmp_path / "run") in line
    assert not (tmp_path / "r.html").exists()


def test_a_run_of_the_loop_can_be_drawn(unbroken, tmp_path):
    notes = write_report([unbroken], tmp_path / "r.html")
    assert notes == [f"{unbroken / 'previews'}: 2 of the files are no PNG"]  # the tiny task writes text
    text = (tmp_path / "r.html").read_text()
    assert rows_of(text, "Runs")[1][2:4] == ["12 of 12", "96"]
    assert not Path(unbroken / "report.html").exists()


# --- arithmetic ---------------------------------------------------------------------------------------------


def test_smoothing_keeps_constants_and_straight_lines():
    assert [y for _, y in smooth([(float(x), 3.0) for x in range(50)])] == pytest.approx([3.0] * 50)
    line = [(float(x), 2.0 * x) for x in range(100)]
    middle = smooth(line)[10:-10]
    assert [y for _, y in middle] == pytest.approx([2 * x for x, _ in middle])


def test_smoothing_is_a_gaussian_mean():
    """Three points one width apart: weights exp(-1/2), 1, exp(-1/2)."""
    side = math.exp(-0.5)
    points = [(0.0, 0.0), (1.0, 6.0), (2.0, 0.0)]
    assert smooth(points)[1] == (1.0, pytest.approx(6 / (1 + 2 * side)))
    assert smooth([(5.0, 1.0)]) == [(5.0, 1.0)]


def test_smoothing_lessens_noise():
    noisy = [(float(x), (-1.0) ** x) for x in range(1000)]
    smoothed = smooth(noisy)
    assert len(smoothed) == 200
    assert max(abs(y) for _, y in smoothed[5:-5]) < 0.05


def test_thinning_keeps_peaks():
    points = [(float(x), 0.0) for x in range(5000)]
    points[1234] = (1234.0, 99.0)
    points[4321] = (4321.0, -99.0)
    shown = thinned(points)
    assert len(shown) <= DRAWN
    assert points[1234] in shown and points[4321] in shown
    assert shown == sorted(shown)
    assert thinned(points[:DRAWN]) == points[:DRAWN]


def test_an_axis_is_logarithmic_where_positive_values_are_far_apart():
    assert axis_of([1e-3, 1.0]) == Axis(1e-3, 1.0, log=True)
    assert not axis_of([1e-3, 1.0], may_be_log=False).log
    assert not axis_of([0.0, 1.0]).log
    axis = axis_of([1e-3, 1.0])
    assert [axis(value) for value in (1e-3, 1e-2, 1e-1, 1.0)] == pytest.approx([0, 1 / 3, 2 / 3, 1])


@pytest.mark.parametrize(
    ("axis", "ticks"),
    [
        (Axis(0.0, 1.0), [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (Axis(0.0, 9000.0), [0, 2000, 4000, 6000, 8000]),
        (Axis(-0.3, 0.35), [-0.2, 0, 0.2]),
        (Axis(0.9e-3, 1.1, log=True), [1e-3, 1e-2, 1e-1, 1.0]),
        (Axis(0.9, 12.0, log=True), [1, 3, 10]),
    ],
)
def test_ticks_are_round_numbers(axis, ticks):
    found = axis.ticks()
    assert [
        value for value in found if any(value == pytest.approx(tick, abs=1e-12) for tick in ticks)
    ] == found
    assert len(found) >= 3
    assert all(-1e-9 <= axis(value) <= 1 + 1e-9 for value in found)


@pytest.mark.parametrize("value", [0.0, -2.0, 1e-12, 1e12])
def test_an_axis_of_one_value_has_room(value):
    axis = axis_of([value, value])
    assert axis(value) == pytest.approx(0.5)
    assert axis.ticks()
