"""Turn the fetched emoji packages into samples: 64 x 64 pictures and 8 fps clips on white, captioned and split.

In: the npm tarballs that fetch_data.py leaves in a folder. Out: images.parquet (3D pictures in every uniform skin tone, flat ones
without), styles_extra.parquet (flat with skin tones, line drawings) and videos.parquet.
The surprising thing: file names are not believed; fluent_faults.py says what a picture really shows.

    python recipes/mini/prepare_samples.py [images] [extra] [videos] [--packages FOLDER] [--output FOLDER]
"""

from __future__ import annotations

import io
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import resvg_py
import tyro
from emoji_splits import PictureKey, SplitSizes, split_pictures, split_videos
from emoji_table import TONES, Emoji, find_flat_hexcodes, normalise_hexcode, read_emoji_table, write_captions
from fluent_faults import find_shown
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from openemu3.data.samples import read_columns, write_samples
from openemu3.media import read_video, to_pil
from openemu3.records import InputError, Sample

REPOSITORY = Path(__file__).resolve().parents[2]
EMOJIBASE = "emojibase-data-17.0.0.tgz"
PICTURES_3D = "lobehub-fluent-emoji-3d-1.1.0.tgz"
DRAWINGS = "fluentui-emoji-1.3.0.tgz"
ANIMATIONS = tuple(f"lobehub-fluent-emoji-anim-{number}-1.0.0.tgz" for number in (1, 2, 3, 4))
IMAGES_FILE, EXTRA_FILE, VIDEOS_FILE = "images.parquet", "styles_extra.parquet", "videos.parquet"
COUNTED = ("split", "attributes")
SOURCE_SIZE = 256  # pixels; what drawings are rendered at, and what the 3D pictures are
SOURCE_FPS = 24
CLIP_SECONDS = 3


@dataclass(frozen=True)
class Preparation:
    """Prepare the samples of the mini model.

    Args:
        outputs: which files to write.
        packages: folder with the npm tarballs.
        output: folder for the Parquet files.
        size: side of the square pictures, in pixels.
        fps: frames per second of the clips; it has to divide the sources' 24, and a frame has to last whole milliseconds.
        max_samples: at most so many of each file, spread evenly over the pictures; of the clips, the first ones. None: all.
        min_motion: mean absolute difference of neighbouring frames (0 to 255) under which a clip counts as still.
        seed: of the splits.
        sizes: how much is held out.
    """

    outputs: tyro.conf.Positional[tuple[Literal["images", "extra", "videos"], ...]] = ("images", "extra", "videos")
    packages: Path = REPOSITORY / ".cache" / "npm"
    output: Path = REPOSITORY / ".cache" / "mini"
    size: int = 64
    fps: Literal[1, 2, 4, 8] = 8
    max_samples: int | None = None
    min_motion: float = 0.4
    seed: int = 0
    sizes: SplitSizes = field(default_factory=SplitSizes)


@dataclass(frozen=True)
class Source:
    """One picture file: the emoji it shows, its style, and where its bytes are."""

    emoji: Emoji
    style: str
    package: str
    member: str

    @property
    def key(self) -> PictureKey:
        return PictureKey(self.emoji.concept, self.emoji.group, self.style, self.emoji.tone)


@dataclass(frozen=True)
class Clip:
    """One animation: the emoji it shows, its encoded frames, and how much it moves (`measure_motion`)."""

    emoji: Emoji
    media: bytes
    motion: float

    @property
    def key(self) -> PictureKey:
        return PictureKey(self.emoji.concept, self.emoji.group, "animated", "")


def list_sources(packages: Path, table: dict[str, Emoji], dropped: Counter[str]) -> list[Source]:
    """Every still picture of the 3D and drawing packages whose emoji is in the table, in the table's order within each style."""
    named: dict[tuple[str, str], tuple[str, str]] = {}
    for member in _list_members(packages / PICTURES_3D, ".webp"):
        # keycaps are there twice, as "0035-fe0f-20e3" and later as "35-fe0f-20e3": the later ones are all of one size
        named["3D", normalise_hexcode(Path(member).stem)] = (PICTURES_3D, member)
    for folder, style in (("flat", "flat"), ("high-contrast", "line")):
        members = {Path(member).stem: member for member in _list_members(packages / DRAWINGS, ".svg") if f"/{folder}/" in member}
        for file_name, hexcode in find_flat_hexcodes(list(members), table).items():
            named.setdefault((style, hexcode), (DRAWINGS, members[file_name]))
    by_name = {(emoji.concept, emoji.tone): emoji for emoji in table.values()}
    sources: list[Source] = []
    for (style, hexcode), (package, member) in named.items():
        if hexcode not in table:
            dropped[f"{style}: a country's flag, or people of two skin tones"] += 1
            continue
        shown = find_shown(table[hexcode], style)
        if shown is None:
            dropped[f"{style}: picture does not show what its name says"] += 1
            continue
        sources.append(Source(by_name[shown], style, package, member))
    order = {hexcode: place for place, hexcode in enumerate(table)}
    return sorted(sources, key=lambda source: (source.style, order[source.emoji.hexcode]))


def draw_picture(data: bytes, size: int) -> np.ndarray:
    """A WebP or SVG file -> uint8 [size, size, 3] on white, by Lanczos from 256 pixels."""
    if data.lstrip()[:4] == b"<svg":
        data = bytes(resvg_py.svg_to_bytes(svg_string=data.decode(), width=SOURCE_SIZE, height=SOURCE_SIZE, skip_system_fonts=True))
    with Image.open(io.BytesIO(data)) as picture:
        return shrink(picture.convert("RGBA"), size)


def shrink(picture: Image.Image, size: int) -> np.ndarray:
    """An RGBA picture, square or with empty rows on top (three 3D ones have eight) -> uint8 [size, size, 3] on white."""
    width, height = picture.size
    surplus = height - width
    if surplus < 0 or picture.crop((0, 0, width, surplus)).getbbox() is not None:
        raise ValueError(f"a picture is {width} x {height} pixels; only square ones are expected, or empty rows above a square")
    canvas = Image.new("RGBA", (width, width), "white")
    canvas.alpha_composite(picture, (0, 0), (0, surplus))
    return np.asarray(canvas.convert("RGB").resize((size, size), Image.Resampling.LANCZOS))


def encode_picture(pixels: np.ndarray) -> bytes:
    """uint8 [H, W, 3] -> lossless WebP."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "WEBP", lossless=True, quality=80, method=4)
    return buffer.getvalue()


def prepare_pictures(preparation: Preparation, sources: list[Source], splits: dict[PictureKey, str], what: str) -> Iterator[Sample]:
    """Samples of the still pictures, in Unicode's order of the emoji within each style."""
    contents = read_members(preparation.packages, {(source.package, source.member) for source in sources})
    for source in track(sources, what):
        pixels = draw_picture(contents[source.package, source.member], preparation.size)
        yield _build_sample(source.emoji, source.style, "image", encode_picture(pixels), splits[source.key], {})


def describe_clips(preparation: Preparation, clips: list[Clip], splits: dict[PictureKey, str]) -> Iterator[Sample]:
    """Samples of the clips, with what is needed to read them back in their attributes."""
    for clip in clips:
        more = {"fps": str(preparation.fps), "num_frames": str(CLIP_SECONDS * preparation.fps), "motion": f"{clip.motion:.3f}"}
        yield _build_sample(clip.emoji, "animated", "video", clip.media, splits[clip.key], more)


def collect_clips(preparation: Preparation, table: dict[str, Emoji], dropped: Counter[str]) -> list[Clip]:
    """Every animation of an untoned emoji that moves, in the table's order."""
    clips: dict[str, Clip] = {}
    seen: set[str] = set()
    for package in ANIMATIONS:
        with tarfile.open(preparation.packages / package) as archive:
            members = [member for member in archive if member.name.endswith(".webp")]
            for member in track(members, package.removesuffix(".tgz")):
                hexcode = normalise_hexcode(Path(member.name).stem)
                if hexcode not in table or table[hexcode].tone or hexcode in seen:
                    continue
                seen.add(hexcode)
                emoji = table[hexcode]
                if find_shown(emoji, "animated") is None:
                    dropped["animated: picture does not show what its name says"] += 1
                    continue
                frames = draw_clip(archive.extractfile(member).read(), preparation.size, preparation.fps)
                if frames is None:
                    dropped["animated: a still picture"] += 1
                    continue
                motion = measure_motion(frames)
                if motion < preparation.min_motion:
                    dropped[f"animated: moves less than {preparation.min_motion}"] += 1
                    continue
                clips[hexcode] = Clip(emoji, encode_clip(frames, preparation.fps), motion)
                if len(clips) == preparation.max_samples:
                    return [clips[hexcode] for hexcode in table if hexcode in clips]
    return [clips[hexcode] for hexcode in table if hexcode in clips]


def draw_clip(data: bytes, size: int, fps: int) -> np.ndarray | None:
    """An animated WebP -> the first 3 s of its endless loop, uint8 [3 * fps, size, size, 3] on white; None for a still picture.

    The files are made at 24 frames a second and say 42 ms a frame; so durations are read as whole 24ths of a second.
    """
    with Image.open(io.BytesIO(data)) as animation:
        if not getattr(animation, "is_animated", False):
            return None
        shown_at: list[int] = []  # the frame on screen in every 24th of a second of the loop
        durations = _read_frame_durations(data)
        for index, milliseconds in enumerate(durations):
            shown_at += [index] * max(1, round(milliseconds * SOURCE_FPS / 1000))
        wanted = [shown_at[step * SOURCE_FPS // fps % len(shown_at)] for step in range(CLIP_SECONDS * fps)]
        drawn: dict[int, np.ndarray] = {}
        for index in sorted(set(wanted)):
            animation.seek(index)
            drawn[index] = shrink(animation.convert("RGBA"), size)
    return np.stack([drawn[index] for index in wanted])


def measure_motion(frames: np.ndarray) -> float:
    """Mean absolute difference of neighbouring frames uint8 [T, H, W, 3], 0 to 255."""
    return float(np.abs(np.diff(frames.astype(np.int16), axis=0)).mean())


def encode_clip(frames: np.ndarray, fps: int) -> bytes:
    """uint8 [T, H, W, 3] -> animated lossless WebP. Equal neighbours become one longer frame: read it back at `fps`, by timestamps."""
    buffer = io.BytesIO()
    first, *rest = (Image.fromarray(frame) for frame in frames)
    first.save(buffer, "WEBP", save_all=True, append_images=rest, duration=1000 // fps, loop=0, lossless=True, quality=80, method=4)
    media = buffer.getvalue()
    read_back = to_pil(read_video(media, fps=fps)[0])
    if not np.array_equal(np.stack([np.asarray(frame) for frame in read_back]), frames):
        raise RuntimeError("an animated WebP did not come back as it was written; the WebP library is not lossless")
    return media


def _read_frame_durations(webp: bytes) -> list[int]:
    """Milliseconds of every frame, from the ANMF chunks (WebP container specification: 24 bits, 12 bytes into the chunk's data)."""
    durations, position = [], 12
    while position + 8 <= len(webp):
        length = int.from_bytes(webp[position + 4 : position + 8], "little")
        if webp[position : position + 4] == b"ANMF":
            durations.append(int.from_bytes(webp[position + 20 : position + 23], "little"))
        position += 8 + length + length % 2
    return durations


def _build_sample(emoji: Emoji, style: str, kind: Literal["image", "video"], media: bytes, split: str, more: dict[str, str]) -> Sample:
    attributes = {
        "concept": emoji.concept,
        "concept_zh": emoji.concept_zh,
        "group": emoji.group,
        "hexcode": emoji.hexcode,
        "style": style,
        "subgroup": emoji.subgroup,
        "tone": emoji.tone,
    }
    return Sample(f"{style}/{emoji.hexcode}", kind, media, write_captions(emoji, style), attributes | more, split)


def _list_members(package: Path, suffix: str) -> list[str]:
    with tarfile.open(package) as archive:
        return sorted(member.name for member in archive if member.name.endswith(suffix))


def read_members(packages: Path, wanted: set[tuple[str, str]]) -> dict[tuple[str, str], bytes]:
    """File contents by (package, member); one pass over each tarball, for gzip has no random access."""
    contents: dict[tuple[str, str], bytes] = {}
    for package in sorted({package for package, _ in wanted}):
        with tarfile.open(packages / package) as archive:
            for member in archive:
                if (package, member.name) in wanted:
                    contents[package, member.name] = archive.extractfile(member).read()
    return contents


def main(preparation: Preparation) -> None:
    packages = [EMOJIBASE, PICTURES_3D, DRAWINGS, *(ANIMATIONS if "videos" in preparation.outputs else ())]
    for package in packages:
        if not (preparation.packages / package).is_file():
            raise InputError(f"{package} is not in {str(preparation.packages)!r}; recipes/mini/fetch_data.py brings it there")
    table = read_emoji_table(preparation.packages / EMOJIBASE)
    dropped: Counter[str] = Counter()
    stills = list_sources(preparation.packages, table, dropped)
    splits = split_pictures([source.key for source in stills], preparation.sizes, preparation.seed)
    written: list[Path] = []
    limit = preparation.max_samples
    if limit is not None and limit < 1:
        raise InputError(f"max-samples is {limit}; it must be at least 1")

    def write(name: str, samples: Iterator[Sample]) -> None:
        written.append(preparation.output / name)
        write_samples(written[-1], samples)

    if "images" in preparation.outputs:
        write(IMAGES_FILE, prepare_pictures(preparation, thin([s for s in stills if is_main(s)], limit), splits, "pictures"))
    if "extra" in preparation.outputs:
        rest = thin([source for source in stills if not is_main(source)], limit)
        write(EXTRA_FILE, prepare_pictures(preparation, rest, splits, "more styles"))
    if "videos" in preparation.outputs:
        clips = collect_clips(preparation, table, dropped)
        video_splits = split_videos([clip.key for clip in clips], splits, preparation.sizes, preparation.seed)
        write(VIDEOS_FILE, describe_clips(preparation, clips, video_splits))
    for path in written:
        show_counts(path)
    for reason, number in sorted(dropped.items()):
        print(f"left out, {reason}: {number}")


def thin(sources: list[Source], number: int | None) -> list[Source]:
    """At most `number` of them, spread evenly; all where it is None."""
    return sources if number is None else sources[:: max(1, -(-len(sources) // number))]


def is_main(source: Source) -> bool:
    """Whether the picture goes into the main set: 3D in every tone, flat without tones."""
    return source.style == "3D" or (source.style == "flat" and not source.emoji.tone)


def show_counts(path: Path) -> None:
    """Print how many samples of each split, style and tone a file holds."""
    counts = Counter((row["split"], row["attributes"]["style"], row["attributes"]["tone"]) for row in read_columns(path, COUNTED))
    tones = [tone for tone in ("", *TONES) if any(key[2] == tone for key in counts)]
    view = Table("split", "style", *(tone or "no tone" for tone in tones), "all", title=str(path))
    for split, style in sorted({key[:2] for key in counts}):
        numbers = [counts[split, style, tone] for tone in tones]
        view.add_row(split, style, *map(str, numbers), str(sum(numbers)))
    Console(width=max(Console().width, 110)).print(view)  # also legible where there is no terminal


if __name__ == "__main__":
    try:
        main(tyro.cli(Preparation))
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
