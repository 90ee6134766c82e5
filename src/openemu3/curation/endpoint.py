"""Questions about pictures to an OpenAI-compatible endpoint (vLLM, a hosted one, our own server), and their answers.

In: a prompt and frames. Out: what was answered, with the tokens it cost. The surprising thing: the library's own retries are off. Ours
share one clock: when the endpoint says "too many requests", all questions wait, not the one that was told.
"""

from __future__ import annotations

import asyncio
import base64
import io
import os
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from openemu3.records import InputError

# Answers that another try may change: time-out, conflict, too early, too many, and everything that is the server's own fault.
_PASSING_STATUSES = frozenset({408, 409, 425, 429, *range(500, 600)})
# Answers that no question will change: wrong key, no right, wrong address or model.
_SETUP_STATUSES = frozenset({401, 403, 404})
_JPEG_QUALITY = 90


@dataclass(frozen=True, eq=False)
class Question:
    """A prompt and the frames it is about (uint8 [H, W, 3]; none for a question about texts), taken at `fps` frames per second."""

    prompt: str
    frames: tuple[NDArray[np.uint8], ...] = ()
    fps: float = 1.0


@dataclass(frozen=True)
class Answer:
    """What came back. finish: "stop", or "length" (cut off), "content_filter", ...; refusal: the endpoint's own word for it, if any."""

    text: str
    finish: str = "stop"
    refusal: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0


class Ask(Protocol):
    """Whatever answers questions: `Endpoint`, or our own model. Called from several threads.

    name: goes into the key of kept answers; reads_text: whether it takes questions without frames.
    Raises NoAnswerError where this question stays without an answer, EndpointError where any would.
    """

    @property
    def name(self) -> str: ...
    @property
    def reads_text(self) -> bool: ...
    def __call__(self, question: Question) -> Answer: ...


class EndpointError(InputError):
    """The endpoint cannot be used as it is set up: wrong key, address or model, or the money is spent. The run is to stop."""


class NoAnswerError(Exception):
    """One question stays without an answer. final: asking again would change nothing (the endpoint does not take it)."""

    def __init__(self, reason: str, final: bool) -> None:
        super().__init__(reason)
        self.final = final


@dataclass(frozen=True)
class EndpointConfig:
    """Which model answers, how fast it may be asked, and for how much."""

    base_url: str
    """Address of the endpoint, such as http://localhost:8000/v1."""
    model: str
    """The model's name there."""
    api_key_variable: str = "OPENAI_API_KEY"
    """Environment variable with the key; endpoints without keys need none."""
    max_tokens: int = 1024
    """Longest answer; one that reaches it counts as cut off."""
    temperature: float = 0.2
    """0 gives the likeliest answer each time."""
    timeout: float = 120.0
    """Seconds for one try from sending to the last byte."""
    max_attempts: int = 6
    """Tries for a question before it counts as unanswered."""
    first_wait: float = 1.0
    """Seconds before the second try; each further wait is twice as long, and a random part of up to half is taken off."""
    max_wait: float = 60.0
    """Seconds that the growing waits end at. An endpoint that asks for more with Retry-After gets it, up to ten times this."""
    requests_per_minute: float | None = None
    """At most so many tries a minute, evenly; none: as many as there are answers outstanding."""
    price_in: float = 0.0
    """Price of a million tokens of question."""
    price_out: float = 0.0
    """Price of a million tokens of answer."""
    max_cost: float | None = None
    """Stop before the first question after so much was spent; answers outstanding then may add a little."""

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise InputError(f"base_url is {self.base_url!r}; it must begin with http:// or https://")
        if not self.model:
            raise InputError("model is empty; name the endpoint's model")
        for name, least in (("max_tokens", 1), ("temperature", 0), ("max_attempts", 1), ("first_wait", 0), ("max_wait", 0)):
            if not getattr(self, name) >= least:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        for name in ("timeout", "requests_per_minute", "max_cost"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"{name} is {value}; it must be more than 0")
        if min(self.price_in, self.price_out) < 0:
            raise InputError(f"price_in is {self.price_in} and price_out {self.price_out}; neither may be below 0")
        if self.max_cost is not None and not self.price_in + self.price_out:
            raise InputError(f"max_cost is {self.max_cost} but price_in and price_out are 0; give the prices")


@dataclass
class Usage:
    """What was asked and spent so far."""

    requests: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0


class Endpoint:
    """Answers questions over HTTP. Use as a context manager, from as many threads as questions are to be outstanding.

    Raises InputError where the package openai is not installed.
    """

    reads_text = True

    def __init__(self, config: EndpointConfig) -> None:
        self.config = config
        self._openai, self._client = _build_client(config)
        self.usage = Usage()
        self._next_slot = self._not_before = 0.0  # when the next try may be sent, monotonic seconds
        # All requests live in one event loop: a real time limit is then a cancellation, and pace and usage need no locks.
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="endpoint", daemon=True)
        self._thread.start()

    @property
    def name(self) -> str:
        return self.config.model

    def __call__(self, question: Question) -> Answer:
        return asyncio.run_coroutine_threadsafe(self._ask(question), self._loop).result()

    def close(self) -> None:
        """Gives up what is outstanding and closes the connections."""

        async def stop() -> None:
            others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            await self._client.close()

        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(stop(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    async def _ask(self, question: Question) -> Answer:
        messages = [{"role": "user", "content": _write_content(question)}]
        config, usage = self.config, self.usage
        problem = ""
        for attempt in range(config.max_attempts):
            await self._wait_for_slot()
            usage.requests += 1
            usage.retries += attempt > 0
            try:
                async with asyncio.timeout(config.timeout):
                    response = await self._client.chat.completions.create(
                        model=config.model, messages=messages, max_tokens=config.max_tokens, temperature=config.temperature
                    )
                return self._read_answer(response)
            except TimeoutError:
                problem, asked_for = f"no answer within {config.timeout:g} s", 0.0
            except self._openai.APIStatusError as error:
                problem, asked_for = f"status {error.status_code}: {_shorten(error.message)}", _read_retry_after(error.response.headers)
                if error.status_code in _SETUP_STATUSES or error.code == "insufficient_quota":
                    raise EndpointError(f"{config.base_url} does not answer model {config.model!r} with this key: {problem}") from error
                if error.status_code not in _PASSING_STATUSES:
                    raise NoAnswerError(f"the endpoint does not take the question: {problem}", final=True) from error
                if asked_for > 10 * config.max_wait:
                    raise NoAnswerError(f"the endpoint asks to wait for {asked_for:.0f} s: {problem}", final=False) from error
                if asked_for:
                    self._not_before = max(self._not_before, time.monotonic() + asked_for)
            # ValueError: what came is no JSON; the rest: no connection, a broken one, or another shape than an answer has.
            except (self._openai.OpenAIError, ValueError) as error:
                problem, asked_for = _shorten(str(error) or type(error).__name__), 0.0
            if attempt + 1 < config.max_attempts:
                await asyncio.sleep(max(asked_for, min(config.max_wait, config.first_wait * 2**attempt) * random.uniform(0.5, 1)))
        raise NoAnswerError(f"{config.max_attempts} tries failed, the last one with: {problem}", final=False)

    async def _wait_for_slot(self) -> None:
        """Returns when the next try may be sent. Raises EndpointError when the money is spent."""
        config = self.config
        while True:
            if config.max_cost is not None and self.usage.cost >= config.max_cost:
                raise EndpointError(f"{self.usage.cost:.4f} was spent; max_cost is {config.max_cost:g}")
            now = time.monotonic()
            wait = max(self._next_slot, self._not_before) - now
            if wait <= 0:
                break
            await asyncio.sleep(wait)
        if config.requests_per_minute is not None:
            self._next_slot = now + 60 / config.requests_per_minute

    def _read_answer(self, response: Any) -> Answer:
        """Raises ValueError for a response of another shape. Any server may be at the other end, so nothing is taken for granted."""
        choice = next(iter(getattr(response, "choices", None) or ()), None)
        message = getattr(choice, "message", None)
        if message is None:
            raise ValueError("the response has no answer in it")
        text, refusal = getattr(message, "content", None), getattr(message, "refusal", None)
        if not isinstance(text, str | None) or not isinstance(refusal, str | None):
            raise ValueError(f"the answer is {type(text).__name__}, not text")
        counts = getattr(response, "usage", None)
        asked, answered = (_as_count(getattr(counts, name, 0)) for name in ("prompt_tokens", "completion_tokens"))
        cost = (asked * self.config.price_in + answered * self.config.price_out) / 1e6
        self.usage.prompt_tokens += asked
        self.usage.completion_tokens += answered
        self.usage.cost += cost
        return Answer(text or "", str(getattr(choice, "finish_reason", None) or "stop"), refusal or "", asked, answered, cost)


class DescribingModel:
    """Our own model as something that answers: it is shown the frames, and its own question stands for the prompt.

    describe  (frames as PIL pictures, their frames per second) -> text; one frame for a picture. Called by one thread at a time.
    name      tells its answers from another model's among the kept ones.
    """

    reads_text = False

    def __init__(self, describe: Callable[[list[Image.Image], float], str], name: str) -> None:
        self.name = name
        self._describe = describe
        self._lock = threading.Lock()

    def __call__(self, question: Question) -> Answer:
        if not question.frames:
            raise NoAnswerError("the model describes pictures; a question without frames is not for it", final=True)
        frames = [Image.fromarray(frame) for frame in question.frames]
        with self._lock:
            return Answer(self._describe(frames, question.fps))


# ----------------------------------------------------------------------------------------------------------------------------- the details


def _build_client(config: EndpointConfig) -> tuple[Any, Any]:
    """The module openai and its client, which sends nothing about this machine."""
    try:
        import openai
    except ImportError as error:
        raise InputError(
            "captions need the package openai, which is not installed; install it: pip install 'openemu3[curation]'"
        ) from error

    async def leave_out_telemetry(request: Any) -> None:
        for header in [header for header in request.headers if header.lower().startswith("x-stainless")]:
            del request.headers[header]

    client = openai.AsyncOpenAI(
        base_url=config.base_url,
        api_key=os.environ.get(config.api_key_variable) or "none",
        max_retries=0,
        timeout=config.timeout,
        default_headers={"User-Agent": "openemu3"},
        http_client=openai.DefaultAsyncHttpxClient(event_hooks={"request": [leave_out_telemetry]}),
    )
    return openai, client


def _write_content(question: Question) -> list[dict[str, Any]]:
    frames = [{"type": "image_url", "image_url": {"url": _write_data_url(frame)}} for frame in question.frames]
    return [*frames, {"type": "text", "text": question.prompt}]


def _write_data_url(frame: NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _read_retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that the endpoint asks to wait, 0 if it does not. RFC 9110, 10.2.3: seconds, or a date."""
    stated = headers.get("retry-after", "").strip()
    try:
        seconds = float(stated)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(stated).timestamp() - time.time()
        except (ValueError, TypeError, IndexError):
            return 0.0
    return seconds if 0 <= seconds < float("inf") else 0.0


def _as_count(value: object) -> int:
    return value if isinstance(value, int) and value >= 0 else 0


def _shorten(text: str) -> str:
    return " ".join(text.split())[:200]
