"""The report of a curation run: what was kept, what was dropped and why, as one HTML page and as JSON.

In: a run's scores and decisions. Out: report.json and report.html, which holds everything it shows: charts are SVG, thumbnails are in the
page. The surprising thing: scores are read as a stream and only counted, and the thumbnails shown are chosen by a hash of the id, so that
the report of a million items takes no more memory than that of a thousand, and is the same every time.
"""

from __future__ import annotations

import base64
import hashlib
import heapq
import html
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from openemu3.curation import filters
from openemu3.curation.filters import ImageThresholds, Thresholds
from openemu3.curation.pipeline import SCORES, TIMES, Run, read_part, read_thresholds, stream_decisions, to_rows
from openemu3.media import write_aside

_NUM_BINS = 40
# Counted are bins so many times finer; those shown are as wide as it takes to show this share of the values, and the thresholds.
_FINENESS = 64
_SHOWN_SHARE = 0.99
_THUMBNAILS_EACH = 18
# Where histograms begin and end; a score outside is in the first or last bin. None: an edge of what is there.
_RANGES: dict[str, tuple[float, float | None]] = {
    "aesthetic": (1.0, 10.0),
    "text_coverage": (0.0, 1.0),
    "colour_spread": (0.0, None),
    "contrast": (0.0, None),
    "motion": (0.0, None),
    "short_edge": (0.0, None),
    "seconds": (0.0, None),
}
_TITLES = {
    "aesthetic": "aesthetic score (LAION)",
    "text_coverage": "share of the picture under text",
    "colour_spread": "spread of colours (8-bit levels)",
    "contrast": "contrast (8-bit levels)",
    "motion": "motion (flow per frame / shorter edge)",
    "hps": "HPSv2.1",
    "mps": "MPS",
    "short_edge": "shorter edge (pixels)",
    "seconds": "length (seconds)",
}


@dataclass(frozen=True)
class StepCount:
    """How many items came to a step, and why those that stayed there did."""

    step: str
    entered: int
    dropped: dict[str, int]

    @property
    def passed(self) -> int:
        return self.entered - sum(self.dropped.values())


def build_report(run: Run) -> dict[str, Any]:
    """The numbers of the report: funnel, histograms, times, and which items are shown. Reads the scores twice, as a stream."""
    thresholds = read_thresholds(run)
    counts: Counter[tuple[str, str]] = Counter()
    edges = _find_ranges(run, asdict(thresholds))
    histograms = {name: np.zeros((2, _NUM_BINS * _FINENESS), np.int64) for name in edges}  # kept, dropped
    seconds = dict.fromkeys(TIMES, 0.0)
    timed = dict.fromkeys(TIMES, 0)
    shown: dict[tuple[str, str], list[_Shown]] = {}
    below_aesthetic = rescued = offset = num_bytes = 0
    for table, decisions in zip(_read_stream(run), stream_decisions(run, ["step", "reason", "duplicate_of"]), strict=True):
        rows = to_rows(table.drop_columns(["id"]))
        step, reason = (np.array(decisions.column(name).to_pylist(), object) for name in ("step", "reason"))
        counts.update(zip(step, reason, strict=True))
        rows["short_edge"] = np.minimum(rows["width"], rows["height"])
        for name, (low, high) in edges.items():
            for index, mask in enumerate((step == "", step != "")):
                values = rows[name][mask & ~np.isnan(rows[name])]
                if len(values):
                    num_bins = histograms[name].shape[1]
                    bins = np.clip((values - low) / ((high - low) or 1.0) * num_bins, 0, num_bins - 1).astype(int)
                    histograms[name][index] += np.bincount(bins, minlength=num_bins)
        for name in TIMES:
            spent = rows[f"seconds_{name}"]
            seconds[name] += float(np.nansum(spent))
            timed[name] += int(np.count_nonzero(~np.isnan(spent)))
        num_bytes += int(np.nansum(rows["num_bytes"]))
        if isinstance(thresholds, ImageThresholds) and thresholds.min_aesthetic is not None:
            below = filters.is_below_aesthetic(rows, thresholds)
            reached = ~np.isin(step, ["decode", "resolution"])
            below_aesthetic += int(np.count_nonzero(below & reached))
            rescued += int(np.count_nonzero(below & (step == "")))
        originals = decisions.column("duplicate_of").to_pylist()
        for position, identity in enumerate(table.column("id").to_pylist()):
            _choose(shown, (str(step[position]), str(reason[position])), identity, offset + position, originals[position])
        offset += table.num_rows
    return {
        "kind": run.config.source.kind,
        "sources": list(run.config.sources),
        "items": run.num_items,
        "rows": offset,
        "kept": counts["", ""],
        "num_bytes": num_bytes,
        "thresholds": asdict(thresholds),
        "funnel": [
            {"step": s.step, "entered": s.entered, "dropped": s.dropped, "passed": s.passed} for s in count_steps(counts, thresholds)
        ],
        "below_aesthetic": below_aesthetic,
        "rescued": rescued,
        "histograms": {name: _summarize_histogram(histograms[name], *edges[name], _get_marks(name, asdict(thresholds))) for name in edges},
        "seconds": {name: {"total": round(seconds[name], 3), "items": timed[name]} for name in TIMES if timed[name]},
        "shown": [
            {"step": step, "reason": reason, "rows": [(row, original) for _, row, original in sorted(rows, reverse=True)]}
            for (step, reason), rows in sorted(shown.items())
        ],
    }


def count_steps(counts: Mapping[tuple[str, str], int], thresholds: Thresholds) -> list[StepCount]:
    """(step, reason) -> rows, as the funnel: every step in its order."""
    entered, funnel = sum(counts.values()), []
    for name in [*(name for name, _ in filters.get_steps(thresholds)), filters.DUPLICATES]:
        funnel.append(StepCount(name, entered, {reason: count for (step, reason), count in sorted(counts.items()) if step == name}))
        entered = funnel[-1].passed
    return funnel


def _read_stream(run: Run) -> Any:
    columns = ["id", "width", "height", "seconds", "num_bytes", "reason", *SCORES, *(f"seconds_{name}" for name in TIMES)]
    for number in range(run.num_parts):
        yield read_part(run, number, columns)


def _find_ranges(run: Run, thresholds: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """First and last edge of the histogram of each score that there is; its thresholds are between them."""
    least, most = dict[str, float](), dict[str, float]()
    for table in _read_stream(run):
        rows = to_rows(table.drop_columns(["id"]))
        rows["short_edge"] = np.minimum(rows["width"], rows["height"])
        for name in _TITLES:
            values = rows[name][~np.isnan(rows[name])]
            if len(values):
                least[name] = min(least.get(name, np.inf), float(values.min()))
                most[name] = max(most.get(name, -np.inf), float(values.max()))
    edges = {}
    for name in (name for name in _TITLES if name in least):
        low, high = _RANGES.get(name, (least[name], None))
        edges[name] = low, max([most[name], *(1.1 * mark for mark in _get_marks(name, thresholds))]) if high is None else high
    return edges


def _summarize_histogram(fine: NDArray[np.int64], low: float, high: float, marks: Sequence[float]) -> dict[str, Any]:
    """[kept or dropped, fine bins] -> the histogram that is shown: far-off values do not squeeze the others, they are in the last bin."""
    total = np.cumsum(fine.sum(0))
    enough = int(np.searchsorted(total, _SHOWN_SHARE * total[-1])) + 1  # fine bins
    spread = (high - low) or 1.0
    marked = max(((mark - low) / spread * fine.shape[1] * 1.25 for mark in marks), default=0.0)
    width = int(np.clip(np.ceil(max(enough, marked) / _NUM_BINS), 1, _FINENESS))  # fine bins in one that is shown
    shown = fine[:, : _NUM_BINS * width].reshape(2, _NUM_BINS, width).sum(2)
    shown[:, -1] += fine[:, _NUM_BINS * width :].sum(1)
    more = bool(fine[:, _NUM_BINS * width :].any())
    return {
        "from": low,
        "to": low + spread * width / _FINENESS,
        "and_more": more,
        "kept": shown[0].tolist(),
        "dropped": shown[1].tolist(),
    }


_Shown = tuple[int, int, int]  # (order, row, the row that it duplicates or -1)


def _choose(shown: dict[tuple[str, str], list[_Shown]], group: tuple[str, str], identity: str, row: int, original: int) -> None:
    """Keeps the rows of the smallest digests of ids: a fair choice, made in one pass and always the same."""
    draw = -int.from_bytes(hashlib.blake2b(identity.encode(), digest_size=7).digest(), "big")
    chosen = shown.setdefault(group, [])
    if len(chosen) < _THUMBNAILS_EACH:
        heapq.heappush(chosen, (draw, row, original))
    else:
        heapq.heappushpop(chosen, (draw, row, original))


# ------------------------------------------------------------------------------------------------------------------------------------ files


def write_report(run: Run) -> dict[str, Any]:
    """Writes report.json and report.html into the run's folder and returns the numbers."""
    report = build_report(run)
    wanted = {row for group in report["shown"] for pair in group["rows"] for row in pair if row >= 0}
    page = render_page(report, _read_shown(run, sorted(wanted)))
    public = {**report, "shown": None}
    del public["shown"]
    for name, text in (("report.json", json.dumps(public, indent=2, ensure_ascii=False)), ("report.html", page)):
        with write_aside(run.folder / name) as partial:
            partial.write_text(text, encoding="utf-8")
    return public


def _read_shown(run: Run, wanted: Sequence[int]) -> dict[int, dict[str, Any]]:
    """The rows with these numbers."""
    columns = ["id", "width", "height", "thumbnail", "detail", "start", "seconds", *SCORES]
    found: dict[int, dict[str, Any]] = {}
    remaining, offset = list(wanted), 0
    for number in range(run.num_parts):
        rows = pq.read_metadata(run.scores_part(number)).num_rows
        if remaining and remaining[0] < offset + rows:
            table = read_part(run, number, columns)
            while remaining and remaining[0] < offset + rows:
                row = remaining.pop(0)
                found[row] = table.slice(row - offset, 1).to_pylist()[0]
        offset += rows
    return found


_STYLE = """
:root { --ink: #1d2129; --soft: #667; --line: #d9dce3; --back: #fff; --kept: #2f7d5b; --dropped: #c9782b; --mark: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ee; --soft: #9aa; --line: #3a3f4a; --back: #16181d; --kept: #58b58a; --dropped: #d99a5b; --mark: #ff7b72; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back); max-width: 70rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; } h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
table { border-collapse: collapse; width: 100%; }
td, th { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
.soft { color: var(--soft); } .bar { height: .7rem; background: var(--kept); min-width: 1px; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); gap: 1rem; }
h1, p, td { overflow-wrap: break-word; }
@media (max-width: 40rem) { .wide { display: none; } td, th { padding: .25rem .3rem; } body { margin: 1rem auto; padding: 0 .6rem; } }
.thumbs { display: flex; flex-wrap: wrap; gap: .4rem; } figure { margin: 0; width: 128px; font-size: .72rem; overflow-wrap: anywhere; }
figure img { max-width: 128px; max-height: 128px; border: 1px solid var(--line); display: block; }
figure.pair { width: 260px; } figure.pair div { display: flex; gap: 2px; align-items: end; }
.none { margin: 0; width: 126px; height: 60px; border: 1px dashed var(--line); color: var(--soft); padding: .2rem; overflow: hidden;
  box-sizing: border-box; }
svg text { fill: var(--soft); font-size: 10px; }
.k { fill: var(--kept); } .d { fill: var(--dropped); } .m { stroke: var(--mark); stroke-width: 1.5; }
"""


def render_page(report: dict[str, Any], rows: dict[int, dict[str, Any]]) -> str:
    """One HTML page that needs nothing else."""
    kind = "pictures" if report["kind"] == "image" else "clips"
    share = report["kept"] / report["rows"] if report["rows"] else 0.0
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width, initial-scale=1'>",
        f"<title>Curation: {report['kept']} of {report['rows']} {kind}</title><style>{_STYLE}</style>",
        f"<h1>{report['kept']:,} of {report['rows']:,} {kind} kept ({share:.1%})</h1>",
        f"<p class=soft>{report['items']:,} files, {report['num_bytes'] / 1e6:,.1f} MB, from {_escape(_list_some(report['sources']))}</p>",
        "<h2>Funnel</h2><table><tr><th>step<th class=n>in<th class=n>dropped<th class=n>left<th class=wide style='width:28%'><th>why</tr>",
    ]
    for step in report["funnel"]:
        dropped = step["entered"] - step["passed"]
        reasons = ", ".join(f"{count:,} {_escape(reason)}" for reason, count in sorted(step["dropped"].items(), key=lambda pair: -pair[1]))
        width = 100 * step["passed"] / report["rows"] if report["rows"] else 0
        parts.append(
            f"<tr><td>{_escape(step['step'])}<td class=n>{step['entered']:,}<td class=n>{dropped:,}<td class=n>{step['passed']:,}"
            f"<td class=wide><div class=bar style='width:{width:.2f}%'></div><td class=soft>{reasons}</tr>"
        )
    parts.append("</table>")
    if report["below_aesthetic"]:
        parts.append(
            f"<p>{report['below_aesthetic']:,} were below the aesthetic threshold of {report['thresholds']['min_aesthetic']}; "
            f"{report['rescued']:,} of them are kept all the same, since they have colours and little text.</p>"
        )
    parts.append("<h2>Scores</h2><p class=soft>Bars are counts: <b style='color:var(--kept)'>kept</b> below, ")
    parts.append(
        "<b style='color:var(--dropped)'>dropped</b> on top of it; <b style='color:var(--mark)'>the line</b> is the threshold.</p>"
        "<div class=charts>"
    )
    parts.extend(_draw_histogram(name, of, _get_marks(name, report["thresholds"])) for name, of in report["histograms"].items())
    parts.append("</div>")
    if report["seconds"]:
        parts.append("<h2>Throughput</h2>" + _render_times(report["seconds"], report["kind"]))
    parts.append("<h2>Examples</h2>")
    order = {"": -1, **{step["step"]: index for index, step in enumerate(report["funnel"])}}
    for group in sorted(report["shown"], key=lambda group: (order.get(group["step"], 99), group["reason"])):
        title = f"{group['step']}: {group['reason']}" if group["step"] else "Kept"
        parts.append(f"<h3>{_escape(title)}</h3><div class=thumbs>")
        parts.extend(_render_figure(rows[row], rows.get(original)) for row, original in group["rows"])
        parts.append("</div>")
    return "\n".join(parts) + "</html>\n"


def _list_some(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _get_marks(name: str, thresholds: dict[str, Any]) -> list[float]:
    names = {"short_edge": ("min_width", "min_height", "min_short_edge")}.get(name, (f"min_{name}", f"max_{name}"))
    return sorted({float(thresholds[key]) for key in names if thresholds.get(key) is not None})


def _draw_histogram(name: str, of: dict[str, Any], marks: list[float]) -> str:
    width, height, left, bottom = 320, 130, 48, 18
    most = max(kept + dropped for kept, dropped in zip(of["kept"], of["dropped"], strict=True)) or 1
    plot_width, plot_height = width - left - 6, height - bottom - 8
    step = plot_width / _NUM_BINS
    shapes = []
    for index, (kept, dropped) in enumerate(zip(of["kept"], of["dropped"], strict=True)):
        x, floor = left + index * step, height - bottom
        for count, style in ((kept, "k"), (dropped, "d")):
            tall = count / most * plot_height
            if count:
                floor -= tall
                shapes.append(f"<rect class={style} x={x:.1f} y={floor:.2f} width={step - 0.6:.1f} height={max(tall, 0.7):.2f} />")
    spread = (of["to"] - of["from"]) or 1.0
    for mark in marks:
        x = left + min(max((mark - of["from"]) / spread, 0), 1) * plot_width
        place = f"x={x - 2:.1f} text-anchor=end" if x > 0.85 * width else f"x={x + 2:.1f}"
        shapes.append(f"<line class=m x1={x:.1f} x2={x:.1f} y1=4 y2={height - bottom} /><text {place} y=12>{_format(mark)}</text>")
    last = _format(of["to"]) + (" and more" if of["and_more"] else "")
    shapes.append(f"<text x={left} y={height - 5}>{_format(of['from'])}</text>")
    shapes.append(f"<text x={width - 6} y={height - 5} text-anchor=end>{last}</text>")
    shapes.append(f"<text x={left - 4} y=14 text-anchor=end>{most:,}</text>")
    label = _escape(_TITLES[name])
    return f"<div>{label}<svg viewBox='0 0 {width} {height}' role=img aria-label='{label}'>{''.join(shapes)}</svg></div>"


def _format(value: float) -> str:
    """Three digits, and no powers of ten where they are not needed."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _render_times(seconds: dict[str, dict[str, float]], kind: str) -> str:
    names = {"read": "read", "decode": "decode", "measure": "colours and hash", "text": "find text", "clip": "CLIP models"}
    if kind == "video":
        names |= {"decode": "find scenes", "measure": "motion, colours and hash"}
    whole = sum(time["total"] for time in seconds.values()) or 1.0
    lines = ["<table><tr><th>step<th class=n>items<th class=n>seconds in all<th class=n>items/s of a worker<th class=n>share</tr>"]
    for name, time in seconds.items():
        rate = time["items"] / time["total"] if time["total"] else float("inf")
        lines.append(
            f"<tr><td>{names[name]}<td class=n>{time['items']:,}<td class=n>{time['total']:,.2f}<td class=n>{rate:,.1f}"
            f"<td class=n>{time['total'] / whole:.1%}</tr>"
        )
    return "".join(lines) + "</table>"


def _render_figure(row: dict[str, Any], original: dict[str, Any] | None) -> str:
    """A thumbnail with its name; of a duplicate the one that is kept beside it."""
    if original is not None:
        return (
            f"<figure class=pair><div>{_render_thumbnail(row)}{_render_thumbnail(original)}</div>{_name(row)} = {_name(original)}</figure>"
        )
    return f"<figure>{_render_thumbnail(row)}{_name(row)}</figure>"


def _name(row: dict[str, Any]) -> str:
    name = row["id"].rsplit("/", 1)[-1]
    name = name if len(name) <= 40 else "…" + name[-39:]
    return _escape(name + (f", {row['start']:.1f} s" if row["start"] is not None else ""))


def _render_thumbnail(row: dict[str, Any]) -> str:
    scores = [f"{name} {row[name]:.3g}" for name in SCORES if row[name] is not None]
    size = f"{row['width']} x {row['height']}" if row["width"] else ""
    when = f"{row['start']:.1f} s + {row['seconds']:.1f} s" if row["start"] is not None else ""
    title = _escape(" | ".join(filter(None, [row["id"], size, when, *scores, row["detail"] or ""])))
    if row["thumbnail"]:
        data = base64.b64encode(row["thumbnail"]).decode()
        return f"<img src='data:image/webp;base64,{data}' alt='{title}' title='{title}' loading=lazy>"
    return f"<p class=none title='{title}'>{_escape((row['detail'] or '')[:90])}</p>"


def _escape(text: str) -> str:
    return html.escape(text, quote=True)
