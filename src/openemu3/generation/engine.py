"""Runs requests through the transformer together and returns the tokens of each.

In: requests (prompt ids, and either the layout of a medium or "text until EOS"). Out: one completion each, in the order of the requests.
The surprising thing: most ids of a layout that are not codes are never computed. What the grammar forces (EOL, EOF, EOI, EOS) is fed
together with the code before it, in the pass which that code needs anyway, and what follows the last code is only written down.

A guided request takes two rows of the cache: its prompt, and its unconditional prompt. Both get the same new tokens. Rows of finished
requests leave at once, waiting requests take their place (first come, first served), and at most `max_rows` rows run together.
docs/life_of_a_request.md tells the same story in prose.

Shapes: N new tokens of a pass, D hidden size, R active requests of one kind (pictures, or text), V candidates of that kind.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from openemu3.generation.kv_cache import MIN_PASS_TOKENS, DecodeAttention, KeyValueCache, PrefillAttention
from openemu3.generation.sampling import SamplingRows, SamplingSettings, guide, sample
from openemu3.model.transformer import Transformer
from openemu3.records import InputError
from openemu3.tokenization.sequence import Vocabulary

Progress = Callable[[int, int], None]  # (tokens drawn so far, tokens to draw at most), after every pass


@dataclass(frozen=True, eq=False)
class Request:
    """One thing to generate.

    Args:
        prompt: ids that begin the sequence, at least one.
        layout: for a medium, the ids after the prompt, -1 where a code is to be drawn (`SequenceFormat.vision_layout`); None for text.
        negative_prompt: ids of the unconditional branch of guidance; None for no guidance.
        max_new_tokens: for text, where to stop if EOS does not come (EOS included); the context's end may come before. Not for media.
        settings: how tokens are drawn.
        stream: tells apart requests that share a seed: pictures of one prompt, windows of one film.
        first_position: number of the first new token in the randomness; resuming a layout in its middle gives the same tokens as
            drawing it in one go when this is the number of tokens that were drawn or forced before.
    """

    prompt: Sequence[int]
    layout: NDArray[np.int64] | None = None
    negative_prompt: Sequence[int] | None = None
    max_new_tokens: int = 1024
    settings: SamplingSettings = SamplingSettings()
    stream: int = 0
    first_position: int = 0


@dataclass(frozen=True, eq=False)
class Completion:
    """The new tokens of a request, int64 [n], forced ones and EOS included; `stopped` is False where text ran into its limit."""

    token_ids: NDArray[np.int64]
    stopped: bool


class Engine:
    """A transformer that answers requests.

    Args:
        transformer: in eval mode (dropout would change the tokens); its device and dtype are where and how things run.
        vocabulary: which ids are text and codes. Raises InputError unless its size is the transformer's.
        max_rows: most rows that run together, at least 2; a guided request takes two.
        max_prefill_tokens: most prompt tokens in one pass; longer prompts are read in several, so that memory does not grow with them.
    """

    def __init__(self, transformer: Transformer, vocabulary: Vocabulary, max_rows: int = 16, max_prefill_tokens: int = 2048) -> None:
        if vocabulary.size != transformer.config.vocab_size:
            raise InputError(f"vocabulary has {vocabulary.size} ids; the transformer has {transformer.config.vocab_size}")
        if max_rows < 2:
            raise InputError(f"max_rows is {max_rows}; at least 2 are needed, since a guided request takes two")
        if max_prefill_tokens < 1:
            raise InputError(f"max_prefill_tokens is {max_prefill_tokens}; at least 1 is allowed")
        self.transformer = transformer
        self.vocabulary = vocabulary
        self.max_rows = max_rows
        self.max_prefill_tokens = max_prefill_tokens

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Completion]:
        """Completions in the order of the requests.

        The tokens of a request depend on its own fields alone; see docs/life_of_a_request.md for what floating point adds to that.
        Raises InputError for a request that cannot be: ids outside the vocabulary, or more tokens than the transformer's context.
        """
        if self.transformer.training:
            raise ValueError("the transformer is in training mode, where dropout would change the tokens; call eval() first")
        jobs = [self._plan(index, request) for index, request in enumerate(requests)]
        run = _Run(self, [job for job in jobs if job.num_draws], progress)
        while run.waiting or run.active:
            run.admit()
            run.advance()
        return [job.complete(self.vocabulary) for job in jobs]

    def _plan(self, index: int, request: Request) -> "_Job":
        """Checks a request and works out what is drawn, what is forced and how much room it takes."""
        config = self.transformer.config
        prompts = [_as_prompt(f"prompt of request {index}", request.prompt, config.vocab_size)]
        # At guidance 1 the unconditional branch cancels out, so it is not run.
        if request.negative_prompt is not None and request.settings.guidance != 1:
            prompts.append(_as_prompt(f"negative prompt of request {index}", request.negative_prompt, config.vocab_size))
        longest = max(len(prompt) for prompt in prompts)
        if request.layout is None:
            room = config.max_positions - longest
            if room < 1:
                raise InputError(
                    f"prompt of request {index} has {longest} tokens; the context holds {config.max_positions}, answer included"
                )
            if request.max_new_tokens < 1:
                raise InputError(f"max_new_tokens is {request.max_new_tokens}; at least 1 is allowed")
            num_draws = min(request.max_new_tokens, room)
            return _Job(request, prompts, np.full(num_draws, -1), np.arange(num_draws), longest + num_draws - 1)
        layout = np.asarray(request.layout, dtype=np.int64)
        if layout.ndim != 1 or (layout < -1).any() or (layout >= config.vocab_size).any():
            raise InputError(f"layout of request {index} must be one row of -1 and ids below {config.vocab_size}")
        if longest + len(layout) > config.max_positions:
            raise InputError(
                f"request {index} takes {longest} prompt tokens and {len(layout)} new ones; the context holds {config.max_positions}"
            )
        free = np.flatnonzero(layout < 0)
        if len(free):
            # What is forced before the first code is read with the prompt.
            prompts = [np.concatenate((prompt, layout[: free[0]])) for prompt in prompts]
        num_cached = longest + (int(free[-1]) if len(free) else 0)  # the last draw and all after it are never fed
        return _Job(request, prompts, layout, free, num_cached)


@dataclass(eq=False)
class _Job:
    """A request under way: plan first, then state."""

    request: Request
    prompts: list[NDArray[np.int64]]  # conditional, then unconditional if guided
    layout: NDArray[np.int64]
    free: NDArray[np.int64]  # [draws], where in the layout tokens are drawn
    num_cached: int  # tokens that each of its cache rows must hold at most
    rows: list[int] = field(default_factory=list)  # cache rows, one for each prompt
    seat: int = -1  # row of the table of drawn tokens
    num_drawn: int = 0
    drawn: NDArray[np.int64] | None = None  # [num_drawn] candidates, once finished
    stopped: bool = False

    @property
    def num_draws(self) -> int:
        return len(self.free)

    @property
    def is_text(self) -> bool:
        return self.request.layout is None

    @property
    def position(self) -> int:
        """Number of the token drawn next, for the randomness."""
        return self.request.first_position + int(self.free[self.num_drawn])

    @property
    def forced(self) -> NDArray[np.int64]:
        """Ids between the token drawn last and the next one to draw."""
        return self.layout[self.free[self.num_drawn - 1] + 1 : self.free[self.num_drawn]]

    def complete(self, vocabulary: Vocabulary) -> Completion:
        if self.is_text:
            assert self.drawn is not None
            return Completion(self.drawn, self.stopped)
        token_ids = self.layout.copy()
        if self.drawn is not None:
            token_ids[self.free] = self.drawn + vocabulary.visual_offset
        return Completion(token_ids, stopped=True)


@dataclass(frozen=True, eq=False)
class _Group:
    """Active jobs of one kind and what it takes to draw for all of them at once; made anew only when the set of jobs changes."""

    jobs: list[_Job]
    indices: Tensor  # int64 [R], their places among all active jobs
    seats: Tensor  # int64 [R]
    hidden_rows: Tensor  # int64 [>= R + guided], cache rows: conditional of every job, unconditional of the guided ones, dummies
    guided: Tensor | None  # int64 [guided], which of the R are guided; None: none
    sampling: SamplingRows
    vocab_slice: slice
    illegal: slice | None  # of the vocab_slice: ids that lie inside it and are not legal


class _Run:
    """One call of `Engine.generate`: the queue, the cache and the rows in use."""

    def __init__(self, engine: Engine, jobs: list[_Job], progress: Progress | None) -> None:
        weight = engine.transformer.lm_head.weight
        config = engine.transformer.config
        self.engine, self.progress, self.device = engine, progress, weight.device
        self.waiting = deque(jobs)
        self.active: list[_Job] = []
        self.groups: list[_Group] = []
        self.num_drawn, self.num_draws = 0, sum(job.num_draws for job in jobs)
        num_rows = min(engine.max_rows, sum(len(job.prompts) for job in jobs))
        capacity = max((job.num_cached for job in jobs), default=0)
        self.cache = KeyValueCache(
            config.num_layers, num_rows, config.num_kv_heads, capacity, config.head_dim, weight.dtype, self.device
        )  # fmt: skip
        self.seats = list(range(num_rows))
        # Candidates stay on the device until their job is finished: no pass waits for the host.
        self.table = torch.zeros(num_rows, max((job.num_draws for job in jobs), default=0), dtype=torch.int64, device=self.device)
        self.last_ids = torch.zeros(0, dtype=torch.int64, device=self.device)  # [active], the token drawn last

    def admit(self) -> None:
        """Lets waiting jobs in while there is room, reads their prompts and draws their first tokens."""
        joined: list[_Job] = []
        while self.waiting and len(self.cache.lengths) + len(self.waiting[0].prompts) <= self.cache.num_rows:
            job = self.waiting.popleft()
            job.rows = [self.cache.add_row() for _ in job.prompts]
            job.seat = self.seats.pop()
            joined.append(job)
        if not joined:
            return
        last_hidden = self._prefill(joined)
        self.active += joined
        self.last_ids = torch.cat((self.last_ids, self.last_ids.new_zeros(len(joined))))
        self._draw(self._group(joined), last_hidden, check=True)
        self._retire()

    def advance(self) -> None:
        """One pass over all active rows: feeds the tokens drawn last with the forced ids after them, and draws the next ones."""
        if not self.active:
            return
        by_row = sorted((row, index) for index, job in enumerate(self.active) for row in job.rows)
        forced = [self.active[index].forced for _, index in by_row]
        counts = [1 + len(ids) for ids in forced]
        owners = torch.tensor([index for _, index in by_row], device=self.device)
        drawn_ids = self.last_ids[owners]  # [rows]
        last = np.cumsum(counts) - 1  # [rows], where each row's last new token is in the line
        if max(counts) == 1:
            line = drawn_ids
        else:
            template = np.concatenate([np.concatenate(([-1], ids)) for ids in forced])
            line = torch.from_numpy(template).to(self.device)
            line[torch.from_numpy(last - np.array(counts) + 1).to(self.device)] = drawn_ids
        attention = self.cache.begin_decode(counts)
        hidden = self._pass(line, attention)
        if max(counts) > 1:
            hidden = hidden[torch.from_numpy(last).to(self.device)]  # [rows, D]
        self._draw(self.groups, hidden)
        self._retire()

    def _pass(self, line: Tensor, attention: PrefillAttention | DecodeAttention) -> Tensor:
        """Hidden states of a line of tokens [N] -> [P, D], of which the first N mean something."""
        filled = F.pad(line, (0, attention.positions.shape[1] - len(line)))
        return self.engine.transformer(filled[None], attention, attention.positions)[0]

    def _prefill(self, jobs: list[_Job]) -> Tensor:
        """Reads the jobs' prompts into the cache; hidden states of their last tokens, [rows in use, D] (zero for other rows)."""
        transformer = self.engine.transformer
        last_hidden = torch.zeros(len(self.cache.lengths), transformer.config.hidden_size, dtype=self.cache.keys.dtype, device=self.device)
        pieces = deque((row, prompt) for job in jobs for row, prompt in zip(job.rows, job.prompts, strict=True))
        while pieces:
            room = self.engine.max_prefill_tokens
            rows: list[int] = []
            parts: list[NDArray[np.int64]] = []
            finished: list[bool] = []
            while pieces and room:
                row, prompt = pieces.popleft()
                part, rest = prompt[:room], prompt[room:]
                rows.append(row)
                parts.append(part)
                finished.append(not len(rest))
                room -= len(part)
                if len(rest):
                    pieces.appendleft((row, rest))
            counts = [len(part) for part in parts]
            attention = self.cache.begin_prefill(rows, counts)
            line = torch.from_numpy(np.concatenate(parts)).to(self.device)
            hidden = self._pass(line, attention)  # [N, D]
            for row, end, is_last in zip(rows, np.cumsum(counts).tolist(), finished, strict=True):
                if is_last:
                    last_hidden[row] = hidden[end - 1]
        return last_hidden

    def _draw(self, groups: list[_Group], hidden: Tensor, check: bool = False) -> None:
        """Draws one token for every job of the groups from the hidden states of the cache rows [rows, D]."""
        for group in groups:
            logits = self.engine.transformer.compute_logits(hidden[group.hidden_rows], group.vocab_slice).to(torch.float32)
            if check and not bool(torch.isfinite(logits).all()):
                raise ValueError("the transformer gives logits that are not finite numbers; its weights are broken")
            scores = logits[: len(group.jobs)]  # [R, V]
            if group.guided is not None:
                unconditional = logits[len(group.jobs) : len(group.jobs) + len(group.guided)]
                if len(group.guided) == len(group.jobs):
                    scores = guide(scores, unconditional, group.sampling.guidance)
                else:
                    scores[group.guided] = guide(scores[group.guided], unconditional, group.sampling.guidance[group.guided])
            if group.illegal is not None:
                scores[:, group.illegal] = -math.inf
            positions = torch.tensor([job.position for job in group.jobs], device=self.device)
            drawn = sample(scores, group.sampling, positions)
            self.table[group.seats, torch.tensor([job.num_drawn for job in group.jobs], device=self.device)] = drawn
            self.last_ids[group.indices] = drawn + group.vocab_slice.start
            for job in group.jobs:
                job.num_drawn += 1
            self.num_drawn += len(group.jobs)
            if group.jobs[0].is_text:
                for job, token_id in zip(group.jobs, drawn.tolist(), strict=True):
                    job.stopped = token_id == self.engine.vocabulary.eos
                    self.num_drawn += (job.num_draws - job.num_drawn) * job.stopped  # what it will not need counts as done
        if self.progress is not None:
            self.progress(self.num_drawn, self.num_draws)

    def _retire(self) -> None:
        """Finished jobs give their rows and seats back; the rest close up. Also makes the groups anew when the set of jobs changed."""
        stay = []
        for index, job in enumerate(self.active):
            if not job.stopped and job.num_drawn < job.num_draws:
                stay.append(index)
                continue
            job.drawn = self.table[job.seat, : job.num_drawn].cpu().numpy().copy()  # the seat will be reused
            self.seats.append(job.seat)
            for row in sorted(job.rows, reverse=True):
                moved = self.cache.remove_row(row)
                for other in self.active:
                    other.rows = [row if used == moved else used for used in other.rows]
            job.rows = []
        changed = len(stay) != sum(len(group.jobs) for group in self.groups) or len(stay) != len(self.active)
        if len(stay) != len(self.active):
            self.last_ids = self.last_ids[torch.tensor(stay, dtype=torch.int64, device=self.device)]
            self.active = [self.active[index] for index in stay]
        if changed:
            self.groups = self._group(self.active)

    def _group(self, jobs: list[_Job]) -> list[_Group]:
        """Media and text draw from different slices of the vocabulary."""
        groups = []
        vocabulary = self.engine.vocabulary
        for is_text in (False, True):
            members = [job for job in jobs if job.is_text == is_text]
            if not members:
                continue
            guided = [place for place, job in enumerate(members) if len(job.rows) == 2]
            rows = [job.rows[0] for job in members] + [members[place].rows[1] for place in guided]
            rows += rows[:1] * (MIN_PASS_TOKENS - len(rows))  # the head is a matrix product too
            text_slice = slice(0, vocabulary.eos + 1)

            def as_tensor(values: list[int]) -> Tensor:
                return torch.tensor(values, dtype=torch.int64, device=self.device)

            groups.append(
                _Group(
                    jobs=members,
                    indices=as_tensor([self.active.index(job) for job in members]),
                    seats=as_tensor([job.seat for job in members]),
                    hidden_rows=as_tensor(rows),
                    guided=as_tensor(guided) if guided else None,
                    sampling=SamplingRows.build(
                        [job.request.settings for job in members], [job.request.stream for job in members], self.device
                    ),
                    vocab_slice=text_slice if is_text else slice(vocabulary.visual_offset, vocabulary.size),
                    illegal=slice(vocabulary.num_text, vocabulary.eos) if is_text else None,
                )
            )
        return groups


def _as_prompt(name: str, ids: Sequence[int], vocab_size: int) -> NDArray[np.int64]:
    prompt = np.asarray(ids)
    if prompt.ndim != 1 or not prompt.size:
        raise InputError(f"{name} has shape {list(prompt.shape)}; it must be one row of at least one id")
    if not np.issubdtype(prompt.dtype, np.integer) or prompt.min() < 0 or prompt.max() >= vocab_size:
        raise InputError(f"{name} holds something that is not an id from 0 to {vocab_size - 1}")
    return prompt.astype(np.int64)
