"""`emu3 demo` on random weights: the page is whole, self-contained and readable, in the source and in a real browser."""

import base64
import html.parser
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def demo_folder(emu3_command, model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "new"
    done = emu3_command("demo", "--model", model_folder, "--output", folder, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["files"] == [str(folder / "index.html"), str(folder / "gallery.png")]
    return folder


class PageReader(html.parser.HTMLParser):
    """Collects tags and text, and whether tags are closed in order."""

    def __init__(self):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "source", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def page(demo_folder):
    reader = PageReader()
    reader.feed((demo_folder / "index.html").read_text(encoding="utf-8"))
    return reader


def get_pictures(page):
    return [attributes for tag, attributes in page.tags if tag == "img"]


def open_data(source):
    return Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/webp;base64,"))))


def test_page_is_well_formed_and_self_contained(page, demo_folder):
    assert not page.open
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe", "object")]
    for _, attributes in page.tags:
        for name in ("src", "srcset", "href"):
            assert attributes.get(name, "#").startswith(("data:image/webp;base64,", "#"))
    source = (demo_folder / "index.html").read_text(encoding="utf-8")
    assert "http" not in source and "url(" not in source
    assert sorted(path.name for path in demo_folder.iterdir()) == ["gallery.png", "index.html"]


def test_page_is_accessible(page):
    assert ("html", {"lang": "en"}) in page.tags
    assert all(attributes.get("alt") for attributes in get_pictures(page))
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1 and all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))
    anchors = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    links = [attributes["href"][1:] for tag, attributes in page.tags if tag == "a"]
    assert links and set(links) <= anchors and len(anchors) == len([a for _, a in page.tags if "id" in a])
    chinese = [attributes for tag, attributes in page.tags if tag == "q" and attributes.get("lang") == "zh"]
    assert len(chinese) == 16 // 4 + 4 // 4 + 1  # drawings, films, and the one of those that is continued


def test_page_shows_everything(page):
    pictures = get_pictures(page)
    by_words = {
        prefix: [a for a in pictures if a["alt"].startswith(prefix)]
        for prefix in ("Drawn", "Real", "A picture", "Film", "given", "continued")
    }
    # Of 16 drawings 5 are held out and shown with the real picture; 4 readings; 4 films, each continued; 4 + 4 stills each.
    counts = {prefix: len(found) for prefix, found in by_words.items()}
    assert counts == {"Drawn": 16, "Real": 5, "A picture": 4, "Film": 4, "given": 4 * 5, "continued": 4 * 5}
    for attributes in pictures:
        with open_data(attributes["src"]) as image:
            assert image.size == (int(attributes["width"]), int(attributes["height"]))
    for attributes in by_words["Film"]:
        with open_data(attributes["src"]) as image:
            assert image.n_frames == 8
    assert len([tag for tag, attributes in page.tags if tag == "source" and "reduced-motion" in attributes["media"]]) == 4 + 4 + 4


def test_text_from_outside_stays_text(page):
    """Captions and the model card hold markup; it must be read as words."""
    assert "3D red apple & <friends>, number 0" in page.text
    assert "<script>alert('no')</script>" in page.text


def test_same_seed_same_pictures(emu3_command, model_folder, demo_folder, tmp_path):
    assert emu3_command("demo", "--model", model_folder, "--output", tmp_path).returncode == 0
    assert (tmp_path / "gallery.png").read_bytes() == (demo_folder / "gallery.png").read_bytes()


def test_gallery(demo_folder):
    with Image.open(demo_folder / "gallery.png") as gallery:
        assert gallery.size == (2 * 24 + 8 * 128 + 7 * 16, 2 * 24 + 2 * (128 + 72) + 16)
        # The two rows of pictures are not blank, and the corner is.
        assert gallery.getpixel((2, 2)) == (255, 255, 255)
        for left, top in ((24, 24), (24 + 7 * 144, 24 + 216)):
            assert len(gallery.crop((left, top, left + 128, top + 128)).getcolors(1 << 16)) > 50


def take_screenshot(page_path: Path, target: Path, width: int, height: int, *flags: str) -> Image.Image:
    """What Chromium shows of the page."""
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", f"--user-data-dir={target.parent / target.stem}",
        f"--window-size={width},{height}", f"--screenshot={target}", *flags, page_path.as_uri(),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return Image.open(target).convert("RGB")


@pytest.fixture(scope="module")
def phone_page(demo_folder):
    """The page in a frame as wide as a phone: Chromium makes no window that narrow."""
    path = demo_folder.parent / "phone.html"
    path.write_text(
        f'<body style="margin:0"><iframe src="{demo_folder.name}/index.html" style="width:390px;height:1600px;border:0"></iframe>'
    )
    return path


def count_colours(picture, *box):
    return len(picture.crop(box).getcolors(1 << 24))


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (Debian package: chromium)")
def test_page_in_a_real_browser(demo_folder, phone_page, tmp_path):
    light = take_screenshot(demo_folder / "index.html", tmp_path / "light.png", 1440, 1000)
    dark = take_screenshot(demo_folder / "index.html", tmp_path / "dark.png", 1440, 1000, "--blink-settings=preferredColorScheme=0")
    phone = take_screenshot(phone_page, tmp_path / "phone.png", 500, 1600)
    assert min(light.getpixel((5, 5))) > 200 and max(dark.getpixel((5, 5))) < 60
    for page, right in ((light, 1440), (phone, 390)):
        assert count_colours(page, 0, 0, right, page.height) > 500  # the pictures are there, not only text
        # Nothing reaches into the margins: all of it fits the width.
        assert count_colours(page, right - 18, 0, right, page.height) == 1
        assert count_colours(page, 0, 0, 18, page.height) == 1
