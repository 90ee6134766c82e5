"""The demo: pictures, readings and films by one model, on one HTML page and in one PNG gallery.

In: a loaded model and the samples of `demo.parquet`, which lies beside its weights. Out: index.html, which needs no other file, no
script and no network, and gallery.png. The surprising thing: the real pictures on the page never reach the model, except where it is
asked to read them off.

A demo sample's attributes say what it is for: "demo" holds one or more of the words draw, read and film (a film is made of the caption
alone), "demo_language" the caption to ask with. A split other than "train" means that the model was not trained on it.
"""

from __future__ import annotations

import base64
import html
import io
import os
import platform
import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from openemu3 import media
from openemu3.data.samples import read_samples
from openemu3.generation.tasks import Emu3, Film
from openemu3.records import InputError, Sample

SAMPLES_FILE = "demo.parquet"
MAX_CONTINUED = 4  # films that are continued; the first ones
GALLERY_COLUMNS = 8
TILE = 128  # pixels of a picture in the gallery
STRIP_FRAMES = 8  # stills under a continued film


@dataclass(frozen=True)
class Drawing:
    """A picture drawn from a sentence. `real`: the picture of that sentence, shown where the model was never trained on it."""

    sentence: str
    language: str
    picture: Image.Image
    translation: str
    real: Image.Image | None = None


@dataclass(frozen=True)
class Reading:
    """A sentence read off a picture, and the true one. `right`: it is a caption of the picture to the letter, in any of its languages."""

    picture: Image.Image
    sentence: str
    truth: str
    right: bool
    held_out: bool


@dataclass(frozen=True)
class Shot:
    """A film made from a sentence, and the frames that the model added at its end (None: it was not asked to).

    held_out: the model was trained on no film of this sentence.
    """

    sentence: str
    language: str
    translation: str
    film: Film
    held_out: bool
    continued: Film | None = None


@dataclass(frozen=True)
class Timing:
    """How long one part took, and how much of what it made."""

    part: str
    amount: str
    seconds: float


@dataclass(frozen=True)
class Demo:
    """All that the page shows.

    facts: names and values of what the model is; model_card: the text beside the weights; context_seconds: how much of a film's end the
    model looks at to continue it.
    """

    drawings: Sequence[Drawing]
    readings: Sequence[Reading]
    shots: Sequence[Shot]
    timings: Sequence[Timing]
    facts: Sequence[tuple[str, str]]
    model_card: str
    tokens_per_picture: int
    context_seconds: float


Progress = Callable[[str, int, int], None]  # (what is going on, tokens drawn so far, tokens to draw at most)


def read_demo_samples(model: str) -> list[Sample]:
    """The demo samples of a model folder ("mini": the one in this package). Raises InputError if it has none."""
    path = _find_folder(model) / SAMPLES_FILE
    if not path.is_file():
        raise InputError(f"{path.parent} has no {SAMPLES_FILE}; the demo needs the samples that ship with a model, as with mini")
    return list(read_samples(path))


def make_demo(emu3: Emu3, model: str, samples: Sequence[Sample], seed: int, progress: Progress) -> Demo:
    """Let the model draw, read, film and continue what the samples ask for; one try each."""
    timings: list[Timing] = []

    def measure(part: str, amount: str, began: float) -> None:
        timings.append(Timing(part, amount, time.monotonic() - began))

    began = time.monotonic()
    asked = _choose(samples, "draw")
    pictures = emu3.draw([_say(sample) for sample in asked], seed=seed, progress=_name(progress, "drawing")) if asked else []
    drawings = [
        Drawing(_say(sample), _get_language(sample), picture, sample.captions["en"], _open_real(sample) if _is_held_out(sample) else None)
        for sample, (picture,) in zip(asked, pictures, strict=True)
    ]
    measure("Pictures drawn", f"{len(asked)} of {emu3.image_area} pixels", began)

    began = time.monotonic()
    shown = _choose(samples, "read")
    texts = emu3.describe([sample.media for sample in shown], max_new_tokens=64, progress=_name(progress, "reading")) if shown else []
    readings = [
        Reading(_open_real(sample), text, sample.captions["en"], text in sample.captions.values(), _is_held_out(sample))
        for sample, text in zip(shown, texts, strict=True)
    ]
    measure("Pictures read", f"{len(shown)}", began)

    began = time.monotonic()
    scenes = _choose(samples, "film")
    seconds = emu3.defaults.clip_frames / emu3.defaults.fps
    sentences = [_say(sample) for sample in scenes]
    films = emu3.film(sentences, seconds, seed=seed, progress=_name(progress, "filming")) if scenes else []
    measure("Films made", f"{len(films)} of {seconds:g} s", began)

    began = time.monotonic()
    given = films[:MAX_CONTINUED]
    wholes = emu3.continue_film(given, seconds, sentences[: len(given)], seed=seed, progress=_name(progress, "continuing")) if given else []
    continued = [Film(whole.pixels[:, film.num_frames :], film.fps) for whole, film in zip(wholes, given, strict=True)]
    measure("Films continued", f"{len(given)} by {seconds:g} s", began)

    shots = [
        Shot(
            _say(sample),
            _get_language(sample),
            sample.captions["en"],
            film,
            _is_held_out(sample),
            continued[index] if index < len(continued) else None,
        )
        for index, (sample, film) in enumerate(zip(scenes, films, strict=True))
    ]
    context_seconds = emu3.defaults.clip_frames / 2 / emu3.defaults.fps
    tokens = emu3.image_area // emu3.vision_tokenizer.config.spatial_factor**2
    return Demo(drawings, readings, shots, timings, _list_facts(emu3), _read_model_card(model), tokens, context_seconds)


def _find_folder(model: str) -> Path:
    return Path(str(resources.files("openemu3") / "assets" / "mini")) if model == "mini" else Path(model)


def _read_model_card(model: str) -> str:
    path = _find_folder(model) / "README.md"
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _choose(samples: Sequence[Sample], use: str) -> list[Sample]:
    return [sample for sample in samples if use in sample.attributes.get("demo", "").split()]


def _get_language(sample: Sample) -> str:
    return sample.attributes.get("demo_language", "en")


def _say(sample: Sample) -> str:
    return sample.captions[_get_language(sample)]


def _is_held_out(sample: Sample) -> bool:
    return sample.split != "train"


def _open_real(sample: Sample) -> Image.Image:
    return media.open_image(sample.media)


def _name(progress: Progress, what: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(what, done, total)


def _list_facts(emu3: Emu3) -> list[tuple[str, str]]:
    transformer, config = emu3.engine.transformer, emu3.engine.transformer.config
    vocabulary, defaults = emu3.format.vocabulary, emu3.defaults
    parameters = [sum(parameter.numel() for parameter in part.parameters()) for part in (transformer, emu3.vision_tokenizer)]
    return [
        ("Transformer", f"{parameters[0]:,} parameters, {config.num_layers} layers of width {config.hidden_size}"),
        ("Vision tokenizer", f"{parameters[1]:,} parameters, {vocabulary.num_codes:,} codes"),
        ("Vocabulary", f"{vocabulary.size:,} tokens, {vocabulary.num_text:,} of them text"),
        ("Pictures", f"{emu3.image_area:,} pixels"),
        ("Clips", f"{defaults.clip_frames} frames at {defaults.fps:g} per second"),
        (
            "Drawing",
            f"guidance {defaults.guidance:g}, temperature {defaults.temperature:g}, top-k {defaults.top_k}, top-p {defaults.top_p:g}",
        ),
        ("torch", torch.__version__),
    ]


def write_demo(demo: Demo, folder: Path) -> tuple[Path, Path]:
    """Write index.html and gallery.png into the folder, each in one move. Raises OSError if that cannot be done."""
    page, gallery = folder / "index.html", folder / "gallery.png"
    with media.write_aside(gallery) as partial:
        draw_gallery(demo.drawings).save(partial, "PNG", optimize=True)
    with media.write_aside(page) as partial:
        partial.write_text(build_page(demo), encoding="utf-8")
    return page, gallery


# -------------------------------------------------------------------------------------------------------------------------------- gallery


def draw_gallery(drawings: Sequence[Drawing]) -> Image.Image:
    """The pictures in rows of eight, each with its sentence in English below it (a font for Chinese may not be there).

    Marked are sentences that the model was given in Chinese, and combinations that it was not trained on.
    """
    margin, gap, caption = 24, 16, 72
    rows = -(-len(drawings) // GALLERY_COLUMNS)
    width = 2 * margin + GALLERY_COLUMNS * TILE + (GALLERY_COLUMNS - 1) * gap
    height = 2 * margin + rows * (TILE + caption) + max(rows - 1, 0) * gap
    sheet = Image.new("RGB", (width, height), "#ffffff")
    pen, font, small = ImageDraw.Draw(sheet), ImageFont.load_default(13), ImageFont.load_default(11)
    for index, drawing in enumerate(drawings):
        row, column = divmod(index, GALLERY_COLUMNS)
        left, top = margin + column * (TILE + gap), margin + row * (TILE + caption + gap)
        sheet.paste(drawing.picture.convert("RGB").resize((TILE, TILE), Image.Resampling.LANCZOS), (left, top))
        pen.rectangle((left - 1, top - 1, left + TILE, top + TILE), outline="#d4d9de")
        marks = (["not in training"] if drawing.real else []) + (["asked in Chinese"] if drawing.language == "zh" else [])
        lines = _wrap(drawing.translation, font, TILE + gap - 6, 4 - max(len(marks), 1))
        for number, line in enumerate(lines):
            pen.text((left, top + TILE + 5 + number * 16), line, "#15191e", font)
        for number, mark in enumerate(marks):
            pen.text((left, top + TILE + 7 + len(lines) * 16 + number * 14), mark, "#a8330a", small)
    return sheet


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, max_lines: int) -> list[str]:
    """Lines of at most `width` pixels; what does not fit into the last one ends in an ellipsis."""
    lines: list[str] = []
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(joined) <= width:
            lines[-1] = joined
        else:
            lines.append(word)
    if len(lines) > max_lines:
        lines = [*lines[: max_lines - 1], " ".join(lines[max_lines - 1 :])]
    if lines and font.getlength(lines[-1]) > width:
        while lines[-1] and font.getlength(lines[-1] + "…") > width:
            lines[-1] = lines[-1][:-1].rstrip()
        lines[-1] += "…"
    return lines


# ----------------------------------------------------------------------------------------------------------------------------------- page


def build_page(demo: Demo) -> str:
    """One HTML document without scripts, with every picture inside it."""
    seen = [drawing for drawing in demo.drawings if drawing.real is None]
    unseen = [drawing for drawing in demo.drawings if drawing.real is not None]
    continued = [shot for shot in demo.shots if shot.continued is not None]
    sections: list[tuple[str, str, str, str, str]] = []  # anchor, its name in the navigation, title, lead, body
    if seen:
        lead = f"Each picture is {demo.tokens_per_picture} tokens, predicted one after another from the sentence below it. One try each."
        sections.append(("drawn", "Drawn", "Drawn from sentences", lead, _build_list("grid", map(_build_drawing, seen))))
    if unseen:
        lead = (
            "In training each of these things came in other styles or skin tones, never in this one. "
            "Left: drawn by the model. Right: the real picture, for comparison."
        )
        sections.append(("unseen", "Unseen", "Combinations it never saw", lead, _build_list("grid pairs", map(_build_pair, unseen))))
    if demo.readings:
        lead = "Shown a real picture, the model writes what it sees; the true name is below its words where they differ."
        sections.append(("read", "Read", "Read off pictures", lead, _build_list("grid readings", map(_build_reading, demo.readings))))
    if demo.shots:
        film = demo.shots[0].film
        lead = f"Each {film.seconds:g} seconds long, {film.fps:g} frames a second. They repeat without end."
        sections.append(("filmed", "Filmed", "Filmed from sentences", lead, _build_list("grid films", map(_build_shot, demo.shots))))
    if continued:
        lead = (
            f"Left: a film from above. Right: what the model predicted next, from its last {demo.context_seconds:g} seconds. "
            "Below: stills of both, in order of time."
        )
        body = _build_list("continuations", map(_build_continuation, continued))
        sections.append(("continued", "Continued", "Films, continued past their end", lead, body))
    sections.append(("made", "How", "How this page was made", "", _build_account(demo)))
    return _PAGE.format(
        style=_STYLE,
        counts=html.escape(
            f"It drew {len(demo.drawings)} pictures, put names to {len(demo.readings)} others, shot {len(demo.shots)} films and "
            f"went on where {len(continued)} of them ended."
        ),
        navigation=" ".join(f'<a href="#{anchor}">{name}</a>' for anchor, name, *_ in sections),
        sections="\n".join(_build_section(anchor, title, lead, body) for anchor, _, title, lead, body in sections),
    )


def _build_list(style: str, items: Iterable[str]) -> str:
    return f'<ul class="{style}">{"".join(items)}</ul>'


def _build_section(name: str, title: str, lead: str, body: str) -> str:
    paragraph = f"<p>{html.escape(lead)}</p>" if lead else ""
    return f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{html.escape(title)}</h2>{paragraph}{body}</section>'


def _build_drawing(drawing: Drawing) -> str:
    picture = _embed(drawing.picture, f"Drawn from: {drawing.translation}")
    caption = _build_sentence(drawing.sentence, drawing.language, drawing.translation)
    return f"<li><figure>{picture}<figcaption>{caption}</figcaption></figure></li>"


def _build_pair(drawing: Drawing) -> str:
    assert drawing.real is not None
    pictures = _embed(drawing.picture, f"Drawn from: {drawing.translation}") + _embed(drawing.real, f"Real picture: {drawing.translation}")
    caption = _build_sentence(drawing.sentence, drawing.language, drawing.translation)
    return f'<li><figure><div class="pair">{pictures}</div><figcaption>{caption}</figcaption></figure></li>'


def _build_sentence(sentence: str, language: str, translation: str) -> str:
    quoted = f'<q lang="{html.escape(language)}">{html.escape(sentence)}</q>'
    return quoted if language == "en" else f"{quoted} <small>{html.escape(translation)}</small>"


def _build_reading(reading: Reading) -> str:
    picture = _embed(reading.picture, f"A picture of: {reading.truth}")
    said = f"<q>{html.escape(reading.sentence)}</q>" if reading.sentence else "(no words)"
    verdict = "exactly right" if reading.right else f"truth: {html.escape(reading.truth)}"
    mark = _MARK if reading.held_out else ""
    return f"<li><figure>{picture}<figcaption>{said} <small>{verdict}</small>{mark}</figcaption></figure></li>"


def _build_shot(shot: Shot) -> str:
    picture = _embed_film(shot.film, f"Film made from: {shot.translation}")
    caption = _build_sentence(shot.sentence, shot.language, shot.translation)
    mark = _MARK if shot.held_out else ""
    return f"<li><figure>{picture}<figcaption>{caption}{mark}</figcaption></figure></li>"


def _build_continuation(shot: Shot) -> str:
    assert shot.continued is not None
    parts = (("given", shot.film, 0.0), ("continued", shot.continued, shot.film.seconds))
    films = "".join(
        f"<figure>{_embed_film(film, f'{name}: {shot.translation}')}<figcaption>{name}, {film.seconds:g} s</figcaption></figure>"
        for name, film, _ in parts
    )
    stills = "".join(
        f"<li>{_embed(film.frames[place], f'{name}, at {start + place / film.fps:.1f} s')}</li>"
        for name, film, start in parts
        for place in _spread(film.num_frames, STRIP_FRAMES // 2)
    )
    caption = _build_sentence(shot.sentence, shot.language, shot.translation)
    return f'<li><figure><div class="pair">{films}</div><ol class="strip">{stills}</ol><figcaption>{caption}</figcaption></figure></li>'


def _build_account(demo: Demo) -> str:
    rows = "".join(_build_row(timing.part, timing.amount, timing.seconds) for timing in demo.timings)
    machine = f"on {os.cpu_count()} CPU cores ({platform.machine()})"
    total = _build_row("Together", machine, sum(timing.seconds for timing in demo.timings))
    facts = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in demo.facts)
    card = f"<details><summary>Model card</summary><pre>{html.escape(demo.model_card.strip())}</pre></details>" if demo.model_card else ""
    return f"""<div class="account">
<div><h3>Time</h3><table>
<thead><tr><th scope="col">Part</th><th scope="col">Amount</th><th scope="col">Seconds</th></tr></thead>
<tbody>{rows}</tbody><tfoot>{total}</tfoot></table>
<p>Made with <code>emu3 demo</code>.</p></div>
<div><h3>Model</h3><dl>{facts}</dl></div>
</div>{card}"""


def _build_row(part: str, amount: str, seconds: float) -> str:
    return f'<tr><th scope="row">{html.escape(part)}</th><td>{html.escape(amount)}</td><td>{seconds:.1f}</td></tr>'


def _embed(picture: Image.Image, text: str) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", lossless=True, method=4)
    return _build_img(buffer.getvalue(), picture.width, picture.height, text)


def _embed_film(film: Film, text: str) -> str:
    """An endless animation; a person whose system asks for less motion gets its first frame."""
    still = media.encode_animation(film.pixels[:, :1], film.fps, "WEBP")
    height, width = film.pixels.shape[2:]
    moving = _build_img(media.encode_animation(film.pixels, film.fps, "WEBP"), width, height, text)
    return f'<picture><source media="(prefers-reduced-motion: reduce)" srcset="{_as_data(still)}">{moving}</picture>'


def _build_img(webp: bytes, width: int, height: int, text: str) -> str:
    return f'<img src="{_as_data(webp)}" width="{width}" height="{height}" alt="{html.escape(text)}" decoding="async">'


def _as_data(webp: bytes) -> str:
    return "data:image/webp;base64," + base64.b64encode(webp).decode("ascii")


def _spread(length: int, count: int) -> list[int]:
    """`count` places spread over 0 ... length - 1, without repeats."""
    return sorted({round(index * (length - 1) / max(count - 1, 1)) for index in range(count)})


_MARK = ' <small class="mark">not in training</small>'

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>openemu3: drawn, read and filmed by one transformer</title>
<style>{style}</style>
</head>
<body>
<header>
<p class="name">openemu3</p>
<h1>One transformer, predicting the next token</h1>
<p>{counts} Text, pictures and films are one sequence of tokens to it. Real pictures stand here only where it says so.</p>
<nav aria-label="Sections">{navigation}</nav>
</header>
<main>
{sections}
</main>
</body>
</html>
"""

_STYLE = textwrap.dedent("""
    :root { --paper: #eef1f4; --ink: #15191e; --soft: #545e69; --line: #cfd6dd; --mark: #a8330a; --tile: #fff; }
    @media (prefers-color-scheme: dark) {
      :root { --paper: #14171b; --ink: #e9ecef; --soft: #a3adb7; --line: #333a42; --mark: #ffa26e; }
    }
    * { box-sizing: border-box; }
    body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
    header, main { max-width: 1180px; margin: 0 auto; padding: 0 20px; }
    header { padding-top: clamp(32px, 7vw, 88px); }
    .name { margin: 0; font: 600 15px/1 ui-monospace, monospace; color: var(--mark); }
    h1 { margin: 12px 0 16px; font: 700 clamp(34px, 6.2vw, 68px)/1.04 Charter, "Bitstream Charter", Cambria, Georgia, serif;
         letter-spacing: -0.02em; max-width: 17ch; text-wrap: balance; }
    header p:not(.name), section > p { max-width: 62ch; color: var(--soft); margin: 0 0 20px; text-wrap: pretty; }
    nav { display: flex; flex-wrap: wrap; gap: 4px 22px; padding: 12px 0; border-block: 1px solid var(--line); }
    a { color: inherit; text-underline-offset: 4px; padding: 4px 0; }
    a:focus-visible, summary:focus-visible { outline: 3px solid var(--mark); outline-offset: 3px; }
    section { padding: clamp(36px, 5vw, 64px) 0 0; }
    h2 { margin: 0 0 10px; font: 700 clamp(24px, 3vw, 34px)/1.15 Charter, "Bitstream Charter", Cambria, Georgia, serif;
         letter-spacing: -0.01em; }
    h3 { margin: 0 0 8px; font-size: 16px; }
    ul, ol { list-style: none; margin: 0; padding: 0; }
    figure { margin: 0; }
    img { display: block; width: 100%; height: auto; background: var(--tile); border-radius: 6px; }
    .grid { display: grid; gap: 20px 14px; grid-template-columns: repeat(3, minmax(0, 1fr)); }
    .pairs, .films, .readings { grid-template-columns: repeat(2, minmax(0, 1fr)); }
    .pair { display: grid; grid-template-columns: 1fr 1fr; gap: 4px; }
    figcaption { margin-top: 6px; font-size: 13px; line-height: 1.35; overflow-wrap: anywhere; }
    q { quotes: none; font: 15px/1.3 Charter, "Bitstream Charter", Cambria, Georgia, "Noto Serif CJK SC", serif; }
    small { display: block; font-size: 12.5px; color: var(--soft); }
    .mark { color: var(--mark); font-weight: 600; }
    .continuations { display: grid; gap: 36px; }
    .continuations .pair { gap: 12px; max-width: 420px; }
    .strip { display: grid; grid-template-columns: repeat(8, minmax(0, 1fr)); gap: 3px; margin: 10px 0 0; }
    .strip img { border-radius: 3px; }
    .strip li:nth-child(n+5) { border-top: 3px solid var(--mark); padding-top: 3px; }
    .strip li:nth-child(-n+4) { border-top: 3px solid var(--line); padding-top: 3px; }
    .account { display: grid; gap: 32px; }
    table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 15px; }
    th, td { text-align: left; padding: 7px 12px 7px 0; border-bottom: 1px solid var(--line); vertical-align: top; font-weight: 400; }
    thead th { color: var(--soft); font-size: 13px; }
    td:last-child, th:last-child { text-align: right; padding-right: 0; white-space: nowrap; }
    tfoot th, tfoot td { border-bottom: 0; font-weight: 600; }
    dl { display: grid; grid-template-columns: auto 1fr; gap: 6px 18px; margin: 0; font-size: 15px; }
    dt { color: var(--soft); }
    dd { margin: 0; font-variant-numeric: tabular-nums; }
    details { margin: 32px 0 72px; }
    summary { cursor: pointer; padding: 6px 0; font-weight: 600; }
    pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 13.5px/1.5 ui-monospace, monospace; max-width: 90ch; }
    code { font: 0.92em ui-monospace, monospace; }
    @media (min-width: 600px) {
      .grid { grid-template-columns: repeat(6, minmax(0, 1fr)); }
      .pairs { grid-template-columns: repeat(3, minmax(0, 1fr)); }
      .films, .readings { grid-template-columns: repeat(4, minmax(0, 1fr)); }
    }
    @media (min-width: 960px) {
      .grid { grid-template-columns: repeat(8, minmax(0, 1fr)); }
      .pairs { grid-template-columns: repeat(4, minmax(0, 1fr)); }
      .films, .readings { grid-template-columns: repeat(6, minmax(0, 1fr)); }
      .continuations { grid-template-columns: repeat(2, minmax(0, 1fr)); }
      .account { grid-template-columns: 1.2fr 1fr; gap: 56px; }
    }
""")
