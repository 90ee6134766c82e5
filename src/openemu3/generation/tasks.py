"""What people ask for: draw pictures, make and continue films, and talk about both. `Emu3.load("mini")`, then a method.

In: text, PIL pictures, files, `Film`s. Out: PIL pictures, `Film`s, text. Bad input raises InputError with one sentence.
The surprising thing: a film longer than one clip of the model is made through pixels. The last frames are encoded afresh as the
beginning of the next clip (half a clip in, half a clip out; paper, section 4.3: 2 s in, 2 s out), so its length has no bound.

Shapes: T pixel frames, H, W pixel size; t = latent frames (4 pixel frames each), h, w = token grid (H / 8, W / 8).
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Generic, TypedDict, TypeVar, Unpack, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image as Picture
from torch import Tensor

from openemu3 import media
from openemu3.generation.engine import Completion, Engine, Progress, Request
from openemu3.generation.sampling import SamplingSettings
from openemu3.model.transformer import Transformer
from openemu3.model.weights import load_into, load_transformer, read_config
from openemu3.records import FRAMES_PER_LATENT, Image, InputError, Video, round_fps
from openemu3.tokenization.sequence import SequenceFormat, Turn, Vocabulary
from openemu3.tokenization.text import TextTokenizer
from openemu3.tokenization.vision import VisionTokenizer, VisionTokenizerConfig

RANKS_FILES = ("text.tiktoken", "emu3.tiktoken", "qwen.tiktoken")
MAX_PROMPT_CHARACTERS = 1_000_000
MAX_DECODED_PIXELS = 2**20  # decoded at once; bounds the memory of a large batch of pictures


@dataclass(frozen=True)
class TaskDefaults:
    """How a checkpoint wants to be asked; the key "generation" of our config.json. The defaults are the published ones.

    Args:
        prompt_suffix, negative_prompt: added to every prompt of a picture or film; the text of the unconditional branch.
        guidance, temperature, top_k, top_p: see SamplingSettings; for pictures and films. Text is greedy.
        question: what `describe` asks in the chat template; None: the caption follows the media at once, without any words.
        fps, clip_frames: rate and length in frames (a multiple of 8) of the clips that the model was trained on.
        min_pixels, max_pixels: area to which pictures and frames are resized before they are looked at.
    """

    prompt_suffix: str = " masterpiece, film grained, best quality."
    negative_prompt: str = (
        "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst quality, low quality, "
        "normal quality, jpeg artifacts, signature, watermark, username, blurry."
    )
    guidance: float = 3.0
    temperature: float = 1.0
    top_k: int = 2048
    top_p: float = 1.0
    question: str | None = "Please describe the image"
    fps: float = 24.0
    clip_frames: int = 96
    min_pixels: int = 512 * 512
    max_pixels: int = 1024 * 1024

    def __post_init__(self) -> None:
        for name in ("prompt_suffix", "negative_prompt"):
            if not isinstance(getattr(self, name), str):
                raise InputError(f"{name} is {getattr(self, name)!r}; text is allowed")
        if self.question is not None and (not isinstance(self.question, str) or not self.question):
            raise InputError(f"question is {self.question!r}; text or null is allowed")
        SamplingSettings(self.temperature, self.top_k, self.top_p, self.guidance)
        round_fps(self.fps)
        for name in ("clip_frames", "min_pixels", "max_pixels"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name} is {value!r}; a whole number of at least 1 is allowed")
        if self.clip_frames % (2 * FRAMES_PER_LATENT):
            raise InputError(
                f"clip_frames is {self.clip_frames}; a multiple of {2 * FRAMES_PER_LATENT} is allowed, since half a clip is context"
            )

    @classmethod
    def parse(cls, raw: object) -> "TaskDefaults":
        """From the object under "generation" in a config.json; what it leaves out has the published value."""
        if not isinstance(raw, Mapping):
            raise InputError(f"generation is {raw!r}; an object is allowed")
        names = [field.name for field in fields(cls)]
        for name in raw:
            if name not in names:
                raise InputError(f"generation has a field {name!r}; {', '.join(names)} are allowed")
        return cls(**raw)


@dataclass(frozen=True, eq=False)
class Film:
    """Frames that move: pixels fp32 [3, T, H, W] in [-1, 1], T >= 1, at `fps` frames per second."""

    pixels: Tensor
    fps: float

    def __post_init__(self) -> None:
        if self.pixels.ndim != 4 or self.pixels.shape[0] != 3 or not self.pixels.numel():
            raise InputError(f"film has pixels of shape {list(self.pixels.shape)}; [3, T, H, W] with at least one frame is allowed")
        object.__setattr__(self, "fps", round_fps(self.fps))

    @classmethod
    def read(cls, source: media.Source, fps: float | None = None, max_frames: int | None = None) -> "Film":
        """A video or animation file, resampled to `fps` if given."""
        return cls(*media.read_video(source, fps=fps, max_frames=max_frames))

    @property
    def num_frames(self) -> int:
        return self.pixels.shape[1]

    @property
    def seconds(self) -> float:
        return self.num_frames / self.fps

    @property
    def frames(self) -> list[Picture]:
        """The frames as PIL pictures."""
        return media.to_pil(self.pixels)

    def save(self, path: str | Path) -> None:
        """Writes .mp4, .gif or .webp, whole or not at all."""
        if Path(path).suffix.lower() == ".mp4":
            media.write_video(path, self.pixels, self.fps)
        else:
            media.write_animation(path, self.pixels, self.fps)


Medium = TypeVar("Medium", Picture, Film)


@dataclass(frozen=True, eq=False)
class Drawn(Generic[Medium]):
    """A picture or a clip with the very tokens it was made of, for training a model on what it drew itself.

    Encoding the medium afresh would not give these tokens: codes -> pixels -> codes changes some of them.

    Args:
        prompt_ids: int64 [n], BOS ... IMG, as the model read them.
        token_ids: int64 [m], what it then drew, with the ids that the grammar forces, up to EOS.
        stream: number of the randomness (see engine.Request); settings: how the tokens were drawn, seed included.
    """

    medium: Medium
    prompt_ids: NDArray[np.int64]
    token_ids: NDArray[np.int64]
    stream: int
    settings: SamplingSettings


Media = Picture | Film | media.Source  # a picture or film, or a file with one (path or bytes)


@dataclass(frozen=True)
class Exchange:
    """One turn of a chat: what is shown, what is asked, and the answer, None for the one that is wanted."""

    text: str
    media: tuple[Media, ...] = ()
    answer: str | None = None


class SamplingOptions(TypedDict, total=False):
    """Keywords of `continue_film`, for the type checker; likewise the classes below for the other methods."""

    negative_prompt: str | None
    guidance: float | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    seed: int
    progress: Progress | None


class FilmOptions(SamplingOptions, total=False):
    height: int | None
    width: int | None
    aspect_ratio: str
    resolution: int | None


class DrawOptions(FilmOptions, total=False):
    num_images: int


class TextOptions(TypedDict, total=False):
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    progress: Progress | None


class Emu3:
    """A loaded model and what it can do. Make one with `Emu3.load`.

    Args:
        transformer, vision_tokenizer, text_tokenizer, vocabulary: the parts; InputError unless they fit together.
        defaults: how the checkpoint wants to be asked.
        image_area: pixels of a picture when no size is asked for.
        max_rows: most rows that run together; a guided picture takes two.
    """

    def __init__(
        self,
        transformer: Transformer,
        vision_tokenizer: VisionTokenizer,
        text_tokenizer: TextTokenizer,
        vocabulary: Vocabulary,
        defaults: TaskDefaults = TaskDefaults(),
        image_area: int = 512 * 512,
        max_rows: int = 16,
    ) -> None:
        if vision_tokenizer.config.codebook_size != vocabulary.num_codes:
            raise InputError(
                f"vision tokenizer has {vision_tokenizer.config.codebook_size} codes; the language model has {vocabulary.num_codes}"
            )
        self.format = SequenceFormat(text_tokenizer, vocabulary)
        self.engine = Engine(transformer, vocabulary, max_rows)
        self.vision_tokenizer = vision_tokenizer
        self.defaults = defaults
        self.image_area = image_area

    @classmethod
    def load(
        cls,
        folder: str | Path = "mini",
        *,
        tokenizer_folder: str | Path | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        max_rows: int = 16,
    ) -> "Emu3":
        """Loads a model folder: "mini" (inside this package), one of ours, or a published one (Emu3-Gen, Emu3-Chat, Emu3-Stage1).

        Args:
            tokenizer_folder: where the vision tokenizer is, if not in `folder` (the published Emu3-VisionTokenizer).
            device: default: the GPU if there is one, else the CPU.
            dtype: of the language model; default bfloat16. The vision tokenizer stays fp32, since bf16 gives other codes.
        Raises:
            InputError: a folder or file that is missing, damaged or foreign, or parts that do not fit together.
        """
        path = find_model_folder(folder)
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        config = read_config(path)
        vision_path, vision_config = path, config.vision_tokenizer
        if tokenizer_folder is not None:
            vision_path, vision_config = Path(tokenizer_folder), read_config(tokenizer_folder).vision_tokenizer
        if vision_config is None:
            raise InputError(f"{vision_path} holds no vision tokenizer; name the folder of one (Emu3-VisionTokenizer) as tokenizer_folder")
        text_tokenizer = TextTokenizer.from_file(_find_ranks([path, vision_path]))
        vocabulary = Vocabulary(
            text_tokenizer.num_tokens if config.num_text is None else config.num_text,
            vision_config["codebook_size"] if config.num_codes is None else config.num_codes,
        )
        defaults = read_defaults(path)
        with torch.device("meta"):
            vision_tokenizer = VisionTokenizer(VisionTokenizerConfig(**vision_config))
        load_into(vision_tokenizer, vision_path, "vision_tokenizer", device, torch.float32)
        transformer = load_transformer(path, device, torch.bfloat16 if dtype is None else dtype)
        image_area = 512 * 512 if config.image_area is None else config.image_area
        return cls(transformer, vision_tokenizer, text_tokenizer, vocabulary, defaults, image_area, max_rows)

    # ---- pictures and films

    @overload
    def draw(self, prompt: str, **options: Unpack[DrawOptions]) -> list[Picture]: ...
    @overload
    def draw(self, prompt: list[str] | tuple[str, ...], **options: Unpack[DrawOptions]) -> list[list[Picture]]: ...
    def draw(
        self,
        prompt: str | list[str] | tuple[str, ...],
        *,
        num_images: int = 1,
        height: int | None = None,
        width: int | None = None,
        aspect_ratio: str = "1:1",
        resolution: int | None = None,
        negative_prompt: str | None = None,
        guidance: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> list[Picture] | list[list[Picture]]:
        """Pictures of a sentence: `num_images` of them, or a list of such lists for several prompts.

        Args:
            prompt: not empty. The checkpoint's prompt_suffix is added.
            height, width: pixels, both or neither, multiples of 8; any size whose tokens fit the context.
            aspect_ratio: "W:H", whole numbers; with an area of resolution squared. Not used when height and width are given.
            resolution: side of the square of the same area; default: the checkpoint's own.
            negative_prompt: text of the unconditional branch; "" for none. guidance 1 switches guidance off.
            negative_prompt, guidance, temperature, top_k, top_p: None: the checkpoint's defaults (see SamplingSettings).
            seed: same seed, same pictures. Picture i of a prompt depends on the prompt, the settings, the seed and i alone.
        """
        if isinstance(num_images, bool) or not isinstance(num_images, int) or num_images < 1:
            raise InputError(f"num_images is {num_images!r}; a whole number of at least 1 is allowed")
        drawn = self.draw_with_tokens(
            _as_list(prompt), range(num_images), height=height, width=width, aspect_ratio=aspect_ratio, resolution=resolution,
            negative_prompt=negative_prompt, guidance=guidance, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
            progress=progress,
        )  # fmt: skip
        groups = [[one.medium for one in group] for group in drawn]
        return groups[0] if isinstance(prompt, str) else groups

    def draw_with_tokens(
        self,
        prompts: Sequence[str],
        streams: Sequence[int],
        *,
        height: int | None = None,
        width: int | None = None,
        aspect_ratio: str = "1:1",
        resolution: int | None = None,
        negative_prompt: str | None = None,
        guidance: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> list[list[Drawn[Picture]]]:
        """What `draw` draws, with its tokens: for each prompt, picture number i for every i of `streams`; the rest as in `draw`."""
        grid = self._choose_grid(height, width, aspect_ratio, resolution)
        settings = self._choose_settings(guidance, temperature, top_k, top_p, seed)
        negative = self.defaults.negative_prompt if negative_prompt is None else negative_prompt
        layout = self.format.vision_layout(grid)
        unconditional = self.format.image_prompt(negative, grid)
        requests = []
        for text in prompts:
            conditional = self.format.image_prompt(_check_text("prompt", text) + self.defaults.prompt_suffix, grid)
            requests += [Request(conditional, layout, unconditional, settings=settings, stream=stream) for stream in streams]
        completions = self.engine.generate(requests, progress)
        pictures = self._decode_images([self._read_codes(done, layout).reshape(grid) for done in completions])
        return _group_drawn(requests, completions, pictures, len(streams))

    @overload
    def film(self, prompt: str, seconds: float, fps: float | None = None, **options: Unpack[FilmOptions]) -> Film: ...
    @overload
    def film(
        self, prompt: list[str] | tuple[str, ...], seconds: float, fps: float | None = None, **options: Unpack[FilmOptions]
    ) -> list[Film]: ...
    def film(
        self,
        prompt: str | list[str] | tuple[str, ...],
        seconds: float,
        fps: float | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        aspect_ratio: str = "1:1",
        resolution: int | None = None,
        negative_prompt: str | None = None,
        guidance: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Film | list[Film]:
        """A film of a sentence, or a list of films for several prompts; arguments as in `draw`.

        It has round(seconds * fps) frames. Up to one clip of the model (`defaults.clip_frames`) is made in one go, and what is longer is
        continued as `continue_film` does. fps: default: the rate the model was trained on. progress: of each clip by itself.
        """
        prompts = _as_list(prompt)
        rate = self.defaults.fps if fps is None else round_fps(fps)
        num_frames = _count_frames(seconds, rate)
        grid = self._choose_grid(height, width, aspect_ratio, resolution)
        settings = self._choose_settings(guidance, temperature, top_k, top_p, seed)
        negative = self.defaults.negative_prompt if negative_prompt is None else negative_prompt
        first = min(num_frames, self.defaults.clip_frames)
        clips = self._film_clips(prompts, (0,), first, rate, grid, negative, settings, progress)
        films = [drawn.medium.pixels for (drawn,) in clips]
        pieces = [[film] for film in films]
        for new in self._continue(films, num_frames - first, rate, prompts, negative, settings, progress):
            for parts, part in zip(pieces, new, strict=True):
                parts.append(part)
        whole = [Film(torch.cat(parts, dim=1), rate) for parts in pieces]
        return whole[0] if isinstance(prompt, str) else whole

    def film_with_tokens(
        self,
        prompts: Sequence[str],
        streams: Sequence[int],
        seconds: float | None = None,
        fps: float | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        aspect_ratio: str = "1:1",
        resolution: int | None = None,
        negative_prompt: str | None = None,
        guidance: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> list[list[Drawn[Film]]]:
        """Clips with their tokens: for each prompt, clip number i for every i of `streams`; clip 0 is what `film` makes.

        seconds: default: one clip of the model. A longer film is not one sequence of tokens, so InputError is raised for it.
        """
        rate = self.defaults.fps if fps is None else round_fps(fps)
        most = self.defaults.clip_frames
        num_frames = most if seconds is None else _count_frames(seconds, rate)
        if num_frames > most:
            raise InputError(f"seconds is {seconds!r}; one clip of the model is at most {most} frames, {most / rate:g} s at this rate")
        grid = self._choose_grid(height, width, aspect_ratio, resolution)
        settings = self._choose_settings(guidance, temperature, top_k, top_p, seed)
        negative = self.defaults.negative_prompt if negative_prompt is None else negative_prompt
        return self._film_clips(prompts, streams, num_frames, rate, grid, negative, settings, progress)

    def _film_clips(
        self,
        prompts: Sequence[str],
        streams: Sequence[int],
        num_frames: int,
        rate: float,
        grid: tuple[int, int],
        negative: str,
        settings: SamplingSettings,
        progress: Progress | None,
    ) -> list[list[Drawn[Film]]]:
        """For each prompt and stream one clip of `num_frames` frames, at most `defaults.clip_frames`, made in one go."""
        clip = (math.ceil(num_frames / FRAMES_PER_LATENT), *grid)
        layout = self.format.vision_layout(clip)
        unconditional = self.format.video_prompt(negative, clip, rate, num_frames)
        requests = []
        for text in prompts:
            conditional = self.format.video_prompt(_check_text("prompt", text) + self.defaults.prompt_suffix, clip, rate, num_frames)
            requests += [Request(conditional, layout, unconditional, settings=settings, stream=stream) for stream in streams]
        completions = self.engine.generate(requests, progress)
        films = []
        for done in completions:
            codes = self._as_tensor(self._read_codes(done, layout).reshape(clip))
            films.append(Film(self.vision_tokenizer.decode_video(codes[None], num_frames)[0].cpu().clamp(-1, 1), rate))
        return _group_drawn(requests, completions, films, len(streams))

    @overload
    def continue_film(self, film: Film | media.Source, seconds: float, prompt: str = "", **options: Unpack[SamplingOptions]) -> Film: ...
    @overload
    def continue_film(
        self,
        film: list[Film] | tuple[Film, ...],
        seconds: float,
        prompt: str | list[str] | tuple[str, ...] = "",
        **options: Unpack[SamplingOptions],
    ) -> list[Film]: ...
    def continue_film(
        self,
        film: Film | media.Source | list[Film] | tuple[Film, ...],
        seconds: float,
        prompt: str | list[str] | tuple[str, ...] = "",
        *,
        negative_prompt: str | None = None,
        guidance: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Film | list[Film]:
        """The film with `seconds` more at its end: its own frames as they are, then the new ones.

        The end of the film (half a clip, or all of a shorter film; a few of the oldest frames are left out so that a whole number of
        groups of four remains, and a film of fewer than four frames is preceded by repeats of its first one) is encoded as the beginning of
        a clip, and the model completes the clip. For more than half a clip the window slides: the new end is encoded, and so on.

        Args:
            film: a `Film`, a file (read at the model's rate), or several films. Frames are resized if they are larger than the model's
                area or their sides are no multiples of 8.
            prompt: what it shows; may be empty, and guidance is off then. One for each film if there are several.
            progress: of each window by itself.
        """
        several = isinstance(film, list | tuple)
        sources: Sequence[Film | media.Source] = film if isinstance(film, list | tuple) else [film]
        films = [self._fit_film(one if isinstance(one, Film) else Film.read(one, self.defaults.fps)) for one in sources]
        texts = [prompt] * len(films) if isinstance(prompt, str) else list(prompt)
        if len(texts) != len(films):
            raise InputError(f"{len(texts)} prompts were given for {len(films)} films; one for each, or one for all, is allowed")
        settings = self._choose_settings(guidance, temperature, top_k, top_p, seed)
        negative = self.defaults.negative_prompt if negative_prompt is None else negative_prompt
        whole = []
        for rate in dict.fromkeys(one.fps for one in films):  # films of one rate run together
            chosen = [index for index, one in enumerate(films) if one.fps == rate]
            pieces = {index: [films[index].pixels] for index in chosen}
            windows = self._continue(
                [films[index].pixels for index in chosen], _count_frames(seconds, rate), rate, [texts[index] for index in chosen],
                negative, settings, progress,
            )  # fmt: skip
            for new in windows:
                for index, part in zip(chosen, new, strict=True):
                    pieces[index].append(part)
            whole += [(index, Film(torch.cat(parts, dim=1), rate)) for index, parts in pieces.items()]
        ordered = [done for _, done in sorted(whole, key=lambda pair: pair[0])]
        return ordered if several else ordered[0]

    def _continue(
        self,
        films: Sequence[Tensor],
        num_frames: int,
        rate: float,
        prompts: Sequence[str],
        negative: str,
        settings: SamplingSettings,
        progress: Progress | None,
    ) -> Iterator[list[Tensor]]:
        """New frames [3, T', H, W] of every film, window after window, `num_frames` in all; memory is that of one window.

        Window n (from 1) draws with stream n, so that a long film and the continuation of its first clip are the same.
        """
        most_context = self.defaults.clip_frames // 2
        num_latents = self.defaults.clip_frames // FRAMES_PER_LATENT
        tails = [_cut_tail(film, most_context) for film in films]
        window = 0
        while num_frames > 0:
            window += 1
            contexts = [self.vision_tokenizer.encode_video(self._move(tail)[None])[0] for tail in tails]
            # Never more than half a clip, even where the context is shorter: what a film gets must not depend on those beside it.
            new_latents = min(math.ceil(num_frames / FRAMES_PER_LATENT), num_latents - most_context // FRAMES_PER_LATENT)
            requests = []
            for codes, text in zip(contexts, prompts, strict=True):
                seen = codes.cpu().numpy()
                grid = (num_latents, *seen.shape[1:])

                def prompt_of(words: str, seen: NDArray[np.integer] = seen) -> list[int]:
                    return self.format.continuation_prompt(words, seen, num_latents, rate)

                words = text + self.defaults.prompt_suffix if text else ""
                conditional, unconditional = prompt_of(words), prompt_of(negative) if text else None
                first = len(conditional) - len(self.format.video_prompt(words, grid, rate))  # tokens of what has been seen
                # The clip is announced at its full length, as in training, and left when enough of it is there.
                layout = self.format.vision_layout(grid)[first : first + first // len(seen) * new_latents]
                requests.append(Request(conditional, layout, unconditional, settings=settings, stream=window, first_position=first))
            count = min(num_frames, new_latents * FRAMES_PER_LATENT)
            new = []
            for request, codes, done in zip(requests, contexts, self.engine.generate(requests, progress), strict=True):
                assert request.layout is not None
                drawn = self._as_tensor(self._read_codes(done, request.layout).reshape(new_latents, *codes.shape[1:]))
                clip = self.vision_tokenizer.decode_video(torch.cat((codes, drawn))[None])[0].cpu().clamp(-1, 1)
                begin = FRAMES_PER_LATENT * len(codes)
                new.append(clip[:, begin : begin + count])
            yield new
            num_frames -= count
            tails = [_cut_tail(torch.cat((tail, part), dim=1), most_context) for tail, part in zip(tails, new, strict=True)]

    # ---- text about pictures and films

    @overload
    def describe(self, media: Media, **options: Unpack[TextOptions]) -> str: ...
    @overload
    def describe(self, media: list[Media] | tuple[Media, ...], **options: Unpack[TextOptions]) -> list[str]: ...
    def describe(
        self,
        media: Media | list[Media] | tuple[Media, ...],
        *,
        max_new_tokens: int = 1024,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> str | list[str]:
        """What a picture or film shows; a list of texts for a list of media, each by itself. Greedy unless temperature is set."""
        shown = list(media) if isinstance(media, list | tuple) else [media]
        question = self.defaults.question
        prompts = []
        for one in shown:
            part = self._encode_media(one)
            if question is None:
                prompts.append(self.format.understanding_prompt([part], ""))
            else:
                prompts.append(self.format.chat_prompt([Turn(question, (part,))]))
        texts = self._write(prompts, max_new_tokens, SamplingSettings(temperature, top_k, top_p, 1.0, seed), progress)
        return texts if isinstance(media, list | tuple) else texts[0]

    def answer(self, media: Media | list[Media] | tuple[Media, ...], question: str, **options: Unpack[TextOptions]) -> str:
        """The answer to a question about one or several pictures or films, or about nothing (an empty list). Options as in `chat`."""
        shown = tuple(media) if isinstance(media, list | tuple) else (media,)
        return self.chat([Exchange(question, shown)], **options)

    def chat(
        self,
        turns: Sequence[Exchange],
        *,
        max_new_tokens: int = 1024,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> str:
        """The answer to the last turn, whose own answer is None; all earlier turns have theirs. Any turn may show pictures or films."""
        told = [
            Turn(_check_text(f"text of turn {index}", turn.text), tuple(self._encode_media(one) for one in turn.media), turn.answer)
            for index, turn in enumerate(turns)
        ]
        settings = SamplingSettings(temperature, top_k, top_p, 1.0, seed)
        return self._write([self.format.chat_prompt(told)], max_new_tokens, settings, progress)[0]

    def _write(self, prompts: Sequence[list[int]], max_new_tokens: int, settings: SamplingSettings, progress: Progress | None) -> list[str]:
        requests = [Request(prompt, max_new_tokens=max_new_tokens, settings=settings) for prompt in prompts]
        texts = []
        for done in self.engine.generate(requests, progress):
            ids = done.token_ids[:-1] if done.stopped else done.token_ids  # without EOS
            texts.append(self.format.text_tokenizer.decode(ids.tolist()).strip())
        return texts

    # ---- media <-> codes

    def _encode_media(self, source: Media) -> Image | Video:
        """A picture as in the published preprocessing; a film at the model's rate, or evenly fewer frames if it is longer than a clip."""
        defaults = self.defaults
        factor = self.vision_tokenizer.config.spatial_factor
        if not isinstance(source, Film) and (isinstance(source, Picture) or media.detect_kind(source) == "image"):
            pixels = media.preprocess_image(source, defaults.min_pixels, defaults.max_pixels, factor)
            return Image(self.vision_tokenizer.encode_image(self._move(pixels[:, 0])[None])[0].cpu().numpy())
        film = source if isinstance(source, Film) else Film.read(source, fps=_choose_rate(source, defaults))
        if film.num_frames > defaults.clip_frames:
            chosen = torch.linspace(0, film.num_frames - 1, defaults.clip_frames).round().to(torch.int64)
            film = Film(film.pixels[:, chosen], film.fps * defaults.clip_frames / film.num_frames)
        height, width = film.pixels.shape[2:]
        fitted = media.fit_size(height, width, defaults.min_pixels, defaults.max_pixels, factor)
        pixels = film.pixels if fitted == (height, width) else media.resize(film.pixels, fitted)
        codes = self.vision_tokenizer.encode_video(self._move(pixels)[None])[0]
        return Video(codes.cpu().numpy(), film.fps, film.num_frames)

    def _fit_film(self, film: Film) -> Film:
        """A film with sides that are multiples of 8 and no more pixels than the model's area; as it is if that is so already."""
        factor = self.vision_tokenizer.config.spatial_factor
        height, width = film.pixels.shape[2:]
        fitted = media.fit_size(height, width, 1, max(self.image_area, factor * factor), factor)
        return film if fitted == (height, width) else Film(media.resize(film.pixels, fitted), film.fps)

    def _decode_images(self, codes: Sequence[NDArray[np.int64]]) -> list[Picture]:
        """Pictures of codes [h, w] of one grid, a bounded number of pixels at once."""
        at_once = max(1, MAX_DECODED_PIXELS // (codes[0].size * self.vision_tokenizer.config.spatial_factor**2))
        pictures: list[Picture] = []
        for start in range(0, len(codes), at_once):
            pixels = self.vision_tokenizer.decode_image(self._as_tensor(np.stack(codes[start : start + at_once])))
            pictures += [media.to_pil(one.cpu())[0] for one in pixels]
        return pictures

    def _read_codes(self, completion: Completion, layout: NDArray[np.int64]) -> NDArray[np.int64]:
        """The codes among the tokens, flat."""
        return completion.token_ids[layout < 0] - self.format.vocabulary.visual_offset

    def _move(self, pixels: Tensor) -> Tensor:
        return pixels.to(self.vision_tokenizer.quantize.embedding.weight.device)

    def _as_tensor(self, codes: NDArray[np.int64]) -> Tensor:
        return self._move(torch.from_numpy(codes))

    # ---- choices

    def _choose_grid(self, height: int | None, width: int | None, aspect_ratio: str, resolution: int | None) -> tuple[int, int]:
        factor = self.vision_tokenizer.config.spatial_factor
        if height is None and width is None:
            if resolution is not None and (isinstance(resolution, bool) or not isinstance(resolution, int) or resolution < 1):
                raise InputError(f"resolution is {resolution!r}; a whole number of pixels is allowed")
            return choose_grid(aspect_ratio, self.image_area if resolution is None else resolution**2, factor)
        for name, side in (("height", height), ("width", width)):
            if side is None:
                raise InputError(f"{name} is missing; give height and width, or neither")
            if isinstance(side, bool) or not isinstance(side, int) or side < factor or side % factor:
                raise InputError(f"{name} is {side!r}; a multiple of {factor} pixels is allowed")
        assert height is not None and width is not None
        return height // factor, width // factor

    def _choose_settings(
        self, guidance: float | None, temperature: float | None, top_k: int | None, top_p: float | None, seed: int
    ) -> SamplingSettings:
        defaults = self.defaults
        return SamplingSettings(
            temperature=defaults.temperature if temperature is None else temperature,
            top_k=defaults.top_k if top_k is None else top_k,
            top_p=defaults.top_p if top_p is None else top_p,
            guidance=defaults.guidance if guidance is None else guidance,
            seed=seed,
        )


def find_model_folder(name: str | Path) -> Path:
    """The folder that a model's name means: "mini" is the one inside this package."""
    return Path(str(resources.files("openemu3") / "assets" / "mini")) if name == "mini" else Path(name)


def choose_grid(aspect_ratio: str, area: int, factor: int = 8) -> tuple[int, int]:
    """Token grid (h, w) of a picture of `area` pixels and the ratio "W:H": r = sqrt(area / (W H)), h = round(H r / 8), w = round(W r / 8).

    Source: the published processor (fact sheet 3.4). Raises InputError for a ratio that is none, or that leaves a side without tokens.
    """
    parts = aspect_ratio.split(":") if isinstance(aspect_ratio, str) else []
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() and len(part) <= 4 and int(part) for part in parts):
        raise InputError(f'aspect_ratio is {aspect_ratio!r}; "W:H" with whole numbers from 1 to 9999 is allowed')
    width, height = int(parts[0]), int(parts[1])
    scale = math.sqrt(area / (width * height)) / factor
    grid = (round(height * scale), round(width * scale))
    if not min(grid):
        raise InputError(f"aspect_ratio is {aspect_ratio!r}, which leaves no tokens for one side at an area of {area} pixels")
    return grid


def _group_drawn(
    requests: Sequence[Request], completions: Sequence[Completion], drawn: Sequence[Medium], size: int
) -> list[list[Drawn[Medium]]]:
    """One list for each `size` requests."""
    together = [
        Drawn(medium, np.asarray(request.prompt, np.int64), done.token_ids, request.stream, request.settings)
        for request, done, medium in zip(requests, completions, drawn, strict=True)
    ]
    return [together[start : start + size] for start in range(0, len(together), size)]


def read_defaults(folder: Path) -> TaskDefaults:
    """From config.json, which `read_config` has read before; the published defaults where it has no such key."""
    raw = json.loads((folder / "config.json").read_bytes())
    if "generation" not in raw:
        return TaskDefaults()
    try:
        return TaskDefaults.parse(raw["generation"])
    except InputError as error:
        raise InputError(f"{folder / 'config.json'} cannot be used: {error}") from error


def _find_ranks(folders: Sequence[Path]) -> Path:
    for folder in folders:
        for name in RANKS_FILES:
            if (folder / name).is_file():
                return folder / name
    raise InputError(f"{folders[0]} has no text vocabulary; a ranks file {' or '.join(RANKS_FILES)} is needed there")


def _as_list(prompt: str | list[str] | tuple[str, ...]) -> list[str]:
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise InputError("there is no prompt; at least one is needed")
    return prompts


def _check_text(name: str, text: str) -> str:
    if not isinstance(text, str):
        raise InputError(f"{name} is {type(text).__name__}; text is allowed")
    if not text.strip():
        raise InputError(f"{name} is empty; say something")
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise InputError(f"{name} has {len(text)} characters; at most {MAX_PROMPT_CHARACTERS} are allowed")
    return text


def _count_frames(seconds: float, rate: float) -> int:
    is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool) and math.isfinite(seconds)
    if not is_number or round(seconds * rate) < 1:
        raise InputError(f"seconds is {seconds!r}; at {rate:g} frames per second at least {1 / rate:g} is needed")
    return round(seconds * rate)


def _choose_rate(source: media.Source, defaults: TaskDefaults) -> float:
    """The model's rate, or the lower one at which a longer film has as many frames as a clip."""
    seconds = media.probe_video(source).seconds
    return defaults.fps if not seconds else min(defaults.fps, max(0.001, defaults.clip_frames / seconds))


def _cut_tail(film: Tensor, most_frames: int) -> Tensor:
    """The last frames of [3, T, H, W]: a multiple of four, at most `most_frames`; fewer than four are preceded by repeats of the first."""
    count = min(film.shape[1], most_frames) // FRAMES_PER_LATENT * FRAMES_PER_LATENT
    if count:
        return film[:, -count:]
    missing = FRAMES_PER_LATENT - film.shape[1]
    return torch.cat((film[:, :1].expand(-1, missing, -1, -1), film), dim=1)
