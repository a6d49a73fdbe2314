"""gsa report: what is read of runs as they stand, and what stands on the page."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure
from PIL import Image
from safetensors import safe_open

from gsa.training import RunError, train
from gsa.training.comparison import (
    ReportConfig,
    compare_runs,
    number_rows,
    read_runs,
    setting_rows,
    skipped_tokens,
    warnings,
)
from gsa.training.comparison_plot import PANELS, draw_panel, loss_limits, shown_panels
from gsa.training.metrics import read_metrics


class Links(HTMLParser):
    """Everything that a page refers to, and the text of its cells by row."""

    def __init__(self, text):
        super().__init__()
        self.targets, self.rows, self._cell = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.targets += [value for key, value in attrs if key in ("src", "href", "srcset", "data")]
        self._cell = tag in ("td", "th")
        if tag == "tr":
            self.rows.append([dict(attrs).get("class")])
        elif self._cell:
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data):
        if self._cell:
            self.rows[-1][-1] += data.strip()

    def row(self, name):
        return next(row for row in self.rows if row[1] == name)


def write_run(folder, *, name="", losses, val=None, config=None, fingerprints=None, end=""):
    """A run folder of its lines alone: loss None for a skipped step, val {step: loss}."""
    folder.mkdir()
    skipped = 0
    with (folder / "metrics.jsonl").open("w") as file:
        for step, loss in enumerate(losses, 1):
            skipped += loss is None
            line = {"step": step, "loss": loss, "ppl": None, "lr": 0.1 / step, "grad_norm": 0.5}
            line |= {"tokens": 100 * step, "tokens_per_s": 1000.0 + step, "seconds": 0.5 * step}
            line |= {"skipped": skipped, "data_wait": 0.01}
            file.write(json.dumps(line) + "\n")
            if step in (val or {}):
                held_out = {"step": step, "val_loss": val[step], "tokens": 100 * step}
                file.write(json.dumps(held_out | {"whole": step == len(losses)}) + "\n")
        file.write(end)
    if name:
        settings = {"config": {"name": name, "out": str(folder), "steps": 8} | (config or {})}
        settings |= {"fingerprints": fingerprints or {"data": "a", "validation": "b"}}
        settings |= {"versions": {"torch": "2.13.0", "commit": "abc1234"}}
        (folder / "train.json").write_text(json.dumps(settings))
    return folder


def rows_of(rows):
    return {row.name: row for row in rows}


def test_a_real_run_and_its_copy_broken_off(make_config, tmp_path):
    config = make_config()
    train(config)
    run, broken = tmp_path / "run", tmp_path / "broken"
    broken.mkdir()
    settings = (run / "train.json").read_text()
    (broken / "train.json").write_text(settings.replace('"lr": 0.01', '"lr": 0.02'))
    whole = (run / "metrics.jsonl").read_bytes()
    (broken / "metrics.jsonl").write_bytes(whole[: len(whole) * 2 // 3])

    out = compare_runs(ReportConfig(runs=(str(run), str(broken)), out=str(tmp_path / "r.html")))
    text = out.read_text()
    page = Links(text)
    assert page.targets and all(one.startswith("data:image/png;base64,") for one in page.targets)
    assert not re.search(r"https?:|url\(|@import|<script", text)
    pictures = [base64.b64decode(one.split(",")[1]) for one in page.targets]
    assert len(pictures) == 4  # loss, learning rate, gradient norm, tokens/s
    for picture in pictures:
        assert Image.open(io.BytesIO(picture)).width > 500

    steps, validations = read_metrics(run)
    with safe_open(run / "model.safetensors", "pt") as weights:
        parameters = sum(weights.get_tensor(name).numel() for name in weights.keys())  # noqa: SIM118
    assert page.row("parameters")[2:] == [f"{parameters:,}", "–"]
    left = len(read_metrics(broken)[0])
    assert 0 < left < 12
    assert page.row("steps")[2:] == ["12", f"{left} of 12"]
    assert page.row("tokens seen")[2] == f"{steps[-1]['tokens']:,}"
    last = f"{validations[-1]['val_loss']:.4f} (step 12)"
    assert page.row("held-out loss, last")[2] == last
    assert page.row("torch")[2] == page.row("torch")[3] != "–"


def test_the_settings_that_differ_are_marked(tmp_path):
    a = write_run(tmp_path / "a", name="x", losses=[3, 2], config={"lr": 1, "model": {"k": 1}})
    b = write_run(tmp_path / "b", name="y", losses=[3, 2], config={"lr": 1, "model": {"k": 2}})
    bare = write_run(tmp_path / "bare", losses=[3, 2])
    runs = read_runs([str(a), str(b), str(bare)])
    rows = rows_of(setting_rows(runs))
    assert {name for name, row in rows.items() if row.differs} == {"model.k"}
    assert rows["model.k"].values == ["1", "2", "–"]  # nothing known is no difference
    assert "name" not in rows and "out" not in rows
    numbers = rows_of(number_rows(runs))
    assert numbers["commit"].values == ["abc1234", "abc1234", "–"] and not numbers["commit"].differs
    page = Links(
        compare_runs(ReportConfig(runs=(str(a), str(b)), out=f"{tmp_path}/r.html")).read_text()
    )
    assert page.row("model.k") == ["differs", "model.k", "1", "2"]
    assert page.row("lr") == [None, "lr", "1", "1"]


def test_numbers_and_marks(tmp_path):
    a = write_run(
        tmp_path / "a", name="x", losses=[4, None, 3, None, None, 2], val={3: 2.0, 6: 2.5}
    )
    b = write_run(tmp_path / "b", name="y", losses=[4, 3, 3, 3, 3, 2], val={3: 2.4, 6: 2.4})
    runs = read_runs([str(a), str(b)])
    assert skipped_tokens(runs[0]) == [200, 400, 500] and skipped_tokens(runs[1]) == []
    rows = rows_of(number_rows(runs))
    assert rows["steps skipped"].values == ["3", "0"]
    assert rows["training loss, mean of the last steps"].values == ["3.0000 (3)", "3.0000 (6)"]
    assert rows["held-out loss, last"].values == ["2.5000 (step 6)", "2.4000 (step 6)"]
    assert rows["held-out loss, best"].values == [
        "2.0000 (step 3, part of the text)",
        "2.4000 (step 3, part of the text)",
    ]
    assert (rows["held-out loss, last"].best, rows["held-out loss, best"].best) == (1, 0)
    assert rows["tokens/s, median"].values[0] == "1,004"  # of 1001 to 1006, rounded to even
    assert rows["time in steps"].values == ["0:03", "0:03"]
    assert "MFU, median" not in rows


def test_what_cannot_be_compared_is_said_and_not_marked(tmp_path):
    marks = {"data": "a", "validation": "other"}
    a = write_run(tmp_path / "a", name="x", losses=[4, 3], val={2: 2.0})
    b = write_run(tmp_path / "b", name="y", losses=[4, 3], val={2: 2.1}, fingerprints=marks)
    c = write_run(tmp_path / "c", name="z", losses=[4, 3, 2], val={2: 2.1})
    runs = read_runs([str(a), str(b)])
    assert any("held-out losses cannot be compared" in text for text in warnings(runs))
    assert rows_of(number_rows(runs))["held-out loss, last"].best is None
    assert not warnings(read_runs([str(a), str(c)]))
    whole_and_part = rows_of(number_rows(read_runs([str(a), str(c)])))
    assert whole_and_part["held-out loss, last"].best is None


def test_runs_of_one_name_and_a_folder_given_twice(tmp_path):
    a = write_run(tmp_path / "a", name="same", losses=[3.0])
    b = write_run(tmp_path / "b", name="same", losses=[3.0])
    bare = write_run(tmp_path / "bare", losses=[3.0])
    runs = read_runs([str(a), str(b), str(a), str(bare)])
    assert [run.label for run in runs] == [f"same ({a})", f"same ({b})", "bare"]


def test_names_are_no_markup(tmp_path):
    run = write_run(tmp_path / "a", name="<b>&$x_{$", losses=[3.0, 2.0], config={"prompt": "<i>"})
    text = compare_runs(ReportConfig(runs=(str(run),), out=f"{tmp_path}/r.html")).read_text()
    assert "&lt;b&gt;&amp;$x_{$" in text and "<b>" not in text and "<i>" not in text
    axes = Figure().subplots()
    hidden = write_run(tmp_path / "b", name="_b", losses=[3.0, 2.0])
    draw_panel(axes, PANELS[0], read_runs([str(run), str(hidden)]), legend=True)
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == [r"<b>&\$x_{\$", " _b"]


@pytest.mark.parametrize("end", ['{"step": 3, "lo', '{"step": 3, "loss": 1.0}'[:-1], "\0\0\0"])
def test_a_torn_last_line_is_left_out(tmp_path, end):
    run = write_run(tmp_path / "a", name="x", losses=[3.0, 2.0], end=end)
    assert [row["step"] for row in read_metrics(run)[0]] == [1, 2]
    assert compare_runs(ReportConfig(runs=(str(run),), out=f"{tmp_path}/r.png")).is_file()


@pytest.mark.parametrize(
    "line",
    ['{"step": 3, "lo', "7", '"text"', "{}", "[1]", '{"step": 3, "loss": 1.0}',
     '{"step": 3, "tokens": 9, "loss": "1"}'],
)  # fmt: skip
def test_a_damaged_line_elsewhere_is_named(tmp_path, line):
    run = write_run(tmp_path / "a", losses=[3.0], end=f'{line}\n{{"step": 4, "loss": 1.0}}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 2 is no line of metrics"):
        read_runs([str(run)])


def test_a_run_without_a_step_yet(tmp_path):
    run = write_run(tmp_path / "a", name="young", losses=[])
    younger = write_run(tmp_path / "b", name="younger", losses=[])
    (younger / "metrics.jsonl").unlink()
    for out in ("r.html", "r.png"):
        config = ReportConfig(runs=(str(run), str(younger)), out=str(tmp_path / out))
        assert compare_runs(config).stat().st_size > 5000
    runs = read_runs([str(run), str(younger)])
    assert warnings(runs) == ["young: no step yet.", "younger: no step yet."]


def test_only_what_was_made_here_is_overwritten(tmp_path):
    run = str(write_run(tmp_path / "a", name="x", losses=[3.0, 2.0]))
    for name in ("r.html", "r.png"):
        config = ReportConfig(runs=(run,), out=str(tmp_path / "new" / name))
        assert compare_runs(config) == compare_runs(config)
        other = tmp_path / name
        other.write_bytes(b"mine")
        with pytest.raises(ValueError, match="exists and was not made by gsa report"):
            compare_runs(ReportConfig(runs=(run,), out=str(other)))
        assert other.read_bytes() == b"mine"
    curve = tmp_path / "curve.png"
    Figure().savefig(curve)  # matplotlib's own mark is not ours
    for out, words in ((curve, "was not made by"), (tmp_path / "x.pdf", r"\.html or \.png")):
        with pytest.raises(ValueError, match=words):
            compare_runs(ReportConfig(runs=(run,), out=str(out)))
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ValueError, match="expected a file, got the folder"):
        compare_runs(ReportConfig(runs=(run,), out=str(tmp_path / "folder.png")))


def test_what_is_no_run(tmp_path):
    (tmp_path / "texts").mkdir()
    with pytest.raises(ValueError, match="is no run folder"):
        read_runs([str(tmp_path / "texts")])
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_runs([str(tmp_path / "nothing")])
    run = write_run(tmp_path / "a", name="x", losses=[3.0])
    for text in (
        *("{", "[1]", '{"config": [1]}', '{"config": {"model": null}}', '{"versions": "1"}'),
        *('{"config": {"steps": [1]}}', '{"fingerprints": {"data": [1]}}'),
    ):
        (run / "train.json").write_text(text)
        with pytest.raises(RunError, match=r"train\.json: damaged"):
            read_runs([str(run)])


def test_one_run_that_flew_apart_does_not_flatten_the_others(tmp_path):
    good = [5.0 - 0.03 * i for i in range(100)]
    a = write_run(tmp_path / "a", name="good", losses=good, val={100: 2.2})
    b = write_run(tmp_path / "b", name="bad", losses=good[:50] + [1e4] * 50)
    low, high = loss_limits(read_runs([str(a), str(b)])) or (0, 0)
    assert low < min(good) and 4.9 < high < 5.5


def test_panels_hold_the_numbers_of_the_run(tmp_path):
    run = write_run(tmp_path / "a", name="x", losses=[4, None, 3, 2, 2], val={3: 2.0, 5: 2.5})
    rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    rows = [row | ({"mfu": 0.4} if "loss" in row else {}) for row in rows]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = read_runs([str(run)])
    shown = [panel.key for panel in shown_panels(runs)]
    assert shown == ["loss", "lr", "grad_norm", "tokens_per_s", "mfu"]
    axes = Figure().subplots()
    draw_panel(axes, PANELS[0], runs, legend=True)
    raw, smooth, validations, skipped = axes.get_lines()
    assert list(raw.get_xdata()) == [100, 300, 400, 500] == list(smooth.get_xdata())
    assert list(raw.get_ydata()) == [4, 3, 2, 2]
    assert list(zip(*validations.get_data(), strict=True)) == [(300, 2.0), (500, 2.5)]
    assert list(skipped.get_xdata()) == [200] and skipped.get_marker() == "x"
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["x (held out: 2.5000)", "held-out loss", "skipped step"]
