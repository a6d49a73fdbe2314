"""The page of `gsa report`: one HTML file with its images inside, nothing fetched from anywhere."""

import base64
from collections.abc import Sequence
from datetime import datetime
from html import escape
from pathlib import Path

from gsa.training.comparison import MADE_BY, Row, Run, number_rows, setting_rows, warnings
from gsa.training.comparison_plot import color, panel_png, shown_panels
from gsa.training.files import write_text

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; background: #fff;
  max-width: 1240px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.panels { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .5rem; }
.panels img { width: 100%; } .panels .loss { grid-column: 1 / -1; }
@media (max-width: 800px) { .panels { grid-template-columns: minmax(0, 1fr); } }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid #ddd;
  vertical-align: top; }
tbody th { font-weight: normal; color: #555; white-space: nowrap; }
tr.differs td { background: #fff3c4; } td.best { font-weight: bold; }
.run { display: inline-block; width: .8em; height: .8em; border-radius: 2px; }
.warning { background: #fff3c4; padding: .4rem .7rem; margin: .3rem 0; }
footer { color: #777; margin-top: 2rem; }
"""


def write_page(out: Path, runs: Sequence[Run]) -> None:
    """Writes the whole page, or leaves what was there."""
    write_text(out, page(runs))


def page(runs: Sequence[Run]) -> str:
    """The page as a string."""
    names = ", ".join(run.label for run in runs)
    settings = setting_rows(runs)
    differing = [row for row in settings if row.differs]
    parts = [
        f"<h1>{escape(names)}</h1>",
        *(f'<p class="warning">{escape(text)}</p>' for text in warnings(runs)),
        "<h2>Curves</h2>",
        "<p>Faint: as measured. Bold: smoothed. Dots: held-out loss. ×: a step that was skipped."
        " Heights above those of most steps are cut off.</p>",
        f'<div class="panels">{_images(runs)}</div>',
        "<h2>Numbers</h2>",
        table(runs, number_rows(runs)),
    ]
    if len(runs) > 1:
        parts.append("<h2>Settings that differ</h2>")
        parts.append(table(runs, differing) if differing else "<p>None that is known.</p>")
    parts.append(f"<details><summary>All settings</summary>{table(runs, settings)}</details>")
    now = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    parts.append(f"<footer>Made by {MADE_BY}, {escape(now)}.</footer>")
    head = (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="generator" content="{MADE_BY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(names)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
    )
    return head + "\n".join(parts) + "\n</body>\n</html>\n"


def table(runs: Sequence[Run], rows: Sequence[Row]) -> str:
    """A column per run; rows in which the runs do not agree are marked."""
    heads = "".join(
        f'<th scope="col"><span class="run" style="background: {_css_color(index)}"></span> '
        f"{escape(run.label)}</th>"
        for index, run in enumerate(runs)
    )
    lines = []
    for row in rows:
        kinds = [' class="best"' if index == row.best else "" for index in range(len(runs))]
        cells = "".join(
            f"<td{kind}>{escape(value)}</td>" for kind, value in zip(kinds, row.values, strict=True)
        )
        mark = ' class="differs"' if row.differs else ""
        lines.append(f'<tr{mark}><th scope="row">{escape(row.name)}</th>{cells}</tr>')
    return (
        f'<div class="wide"><table><thead><tr><th></th>{heads}</tr></thead>\n<tbody>\n'
        + "\n".join(lines)
        + "\n</tbody></table></div>"
    )


def _images(runs: Sequence[Run]) -> str:
    images = []
    for panel in shown_panels(runs):
        data = base64.b64encode(panel_png(panel, runs)).decode()
        kind = ' class="loss"' if panel.key == "loss" else ""
        alt = escape(f"{panel.title}, over tokens seen")
        images.append(f'<img{kind} alt="{alt}" src="data:image/png;base64,{data}">')
    return "\n".join(images)


def _css_color(index: int) -> str:
    from matplotlib.colors import to_hex

    return to_hex(color(index))
