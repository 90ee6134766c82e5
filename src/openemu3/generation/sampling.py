"""From logits to one token per row: guidance, temperature, top-k, top-p, and randomness that is a pure function of its counters.

In: logits over the legal slice of the vocabulary, one row per request, and each row's settings. Out: an index into that slice per row.
The surprising thing: there is no random generator. The noise of a candidate is a hash of (seed, stream, position, candidate), so a
request draws the same token alone, in a batch, or resumed half-way, and asking for fewer numbers never shifts the others.

Order, as published (Emu3's generation script): guidance on the log-softmax of both branches over the full vocabulary -> legal ids
only -> temperature -> top-k -> top-p. Two shortcuts that leave the distribution as it is:
* The logits arrive restricted to the legal slice. Restricting later would change them by the log-normaliser of each branch, which is
  one number for the whole row: u - Zu + s * ((c - Zc) - (u - Zu)) = [u + s * (c - u)] - [Zu + s * (Zc - Zu)]. The last bracket does not
  depend on the candidate, and softmax ignores what is added to a whole row.
* For the same reason no log-softmax is taken at all.

Shapes: R rows (one per request), V candidates (ids of the legal slice), N candidates kept by top-k.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from openemu3.records import InputError

MAX_SEED = 2**63 - 1
MAX_GUIDANCE = 1000.0
MAX_TEMPERATURE = 1000.0

# Weyl increment and multipliers of SplitMix64's finaliser (Steele, Lea, Flood 2014; Stafford's "Mix13"), as signed 64-bit numbers.
_INCREMENT = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9 - 2**64
_MULTIPLIER_2 = 0x94D049BB133111EB - 2**64


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are drawn. The defaults are the published ones for pictures (fact sheet 3.6).

    Args:
        temperature: 0 is greedy (the most likely token, the lowest id among equals); 1 leaves the distribution as it is.
        top_k: keep the k most likely candidates; 0 keeps all.
        top_p: keep the smallest set of most likely candidates whose probabilities reach top_p; 1 keeps all.
        guidance: s in unconditional + s * (conditional - unconditional); 1 is none. Without an unconditional prompt it does nothing.
        seed: 0 ... 2**63 - 1.

    Raises InputError for anything outside these ranges.
    """

    temperature: float = 1.0
    top_k: int = 2048
    top_p: float = 1.0
    guidance: float = 3.0
    seed: int = 0

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, 0, MAX_TEMPERATURE)
        _check_number("guidance", self.guidance, -MAX_GUIDANCE, MAX_GUIDANCE)
        _check_number("top_p", self.top_p, 0, 1)
        if self.top_p == 0:
            raise InputError("top_p is 0; allowed is above 0 up to 1 (temperature 0 is greedy)")
        _check_whole("top_k", self.top_k, 2**31 - 1)
        _check_whole("seed", self.seed, MAX_SEED)


@dataclass(frozen=True)
class SamplingRows:
    """The settings of R rows as tensors on the device, with what the host must know about them to choose the shortest way.

    temperature, top_p, guidance: fp32 [R, 1] (temperature 1 where greedy); top_k: int64 [R, 1] (the largest int where off);
    greedy: bool [R]; keys: int64 [R], the hash of seed and stream.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    guidance: Tensor
    greedy: Tensor
    keys: Tensor
    largest_top_k: int | None  # None: some row keeps all candidates
    uniform_top_k: bool
    any_top_p: bool
    any_greedy: bool
    all_greedy: bool

    @classmethod
    def build(cls, settings: Sequence[SamplingSettings], streams: Sequence[int], device: torch.device) -> "SamplingRows":
        """One row per setting; `streams` tells apart the requests that share a seed (pictures of one prompt, windows of one film)."""
        drawn = [row for row in settings if row.temperature > 0] or list(settings)
        limits = [row.top_k or MAX_SEED for row in settings]

        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

        seeds = torch.tensor([row.seed for row in settings], dtype=torch.int64, device=device)
        return cls(
            temperature=column([row.temperature or 1.0 for row in settings]),
            top_k=torch.tensor(limits, dtype=torch.int64, device=device)[:, None],
            top_p=column([row.top_p for row in settings]),
            guidance=column([row.guidance for row in settings]),
            greedy=torch.tensor([row.temperature == 0 for row in settings], device=device),
            keys=derive_keys(seeds, torch.tensor(list(streams), dtype=torch.int64, device=device)),
            largest_top_k=None if any(row.top_k == 0 for row in drawn) else max(row.top_k for row in drawn),
            uniform_top_k=len({row.top_k for row in drawn}) == 1,
            any_top_p=any(row.top_p < 1 for row in drawn),
            any_greedy=any(row.temperature == 0 for row in settings),
            all_greedy=all(row.temperature == 0 for row in settings),
        )


def guide(conditional: Tensor, unconditional: Tensor, guidance: Tensor) -> Tensor:
    """Classifier-free guidance: unconditional + s * (conditional - unconditional); logits fp32 [R, V], guidance fp32 [R, 1]."""
    return unconditional + guidance * (conditional - unconditional)


def sample(logits: Tensor, rows: SamplingRows, positions: Tensor) -> Tensor:
    """One candidate per row: logits fp32 [R, V] (-inf: not legal) and the rows' positions int64 [R] -> int64 [R] in 0 ... V-1.

    Gumbel-max with counter-based noise: argmax(logit / temperature + noise(seed, stream, position, candidate)) is distributed as
    the softmax. Unlike inverting a cumulative sum, it keeps its choice when the logits change in their last bits (another
    batch size, another kernel): the chance of another token is of the size of the change in probability, not V times that.
    """
    if rows.all_greedy:
        return logits.argmax(dim=-1)
    num_candidates = logits.shape[1]
    limit = num_candidates if rows.largest_top_k is None else min(rows.largest_top_k, num_candidates)
    ordered = rows.any_top_p or not rows.uniform_top_k
    if limit < num_candidates or ordered:
        candidates = _select_largest(logits, limit, ordered)  # [R, N]
        kept = logits.gather(1, candidates) / rows.temperature
        if not rows.uniform_top_k:
            ranks = torch.arange(limit, device=logits.device)
            kept = kept.masked_fill(ranks >= rows.top_k, -math.inf)
        if rows.any_top_p:
            probabilities = kept.softmax(dim=-1)
            before = probabilities.cumsum(dim=-1) - probabilities  # what the more likely candidates already hold
            before[:, 0] = 0  # the first candidate always stays, whatever rounding did
            kept = kept.masked_fill((before >= rows.top_p) & (rows.top_p < 1), -math.inf)
    else:
        candidates = torch.arange(num_candidates, device=logits.device).expand_as(logits)
        kept = logits / rows.temperature
    best = (kept + draw_gumbel(rows.keys, positions, candidates)).argmax(dim=-1, keepdim=True)
    chosen = candidates.gather(1, best).squeeze(1)
    return torch.where(rows.greedy, logits.argmax(dim=-1), chosen) if rows.any_greedy else chosen


def derive_keys(seeds: Tensor, streams: Tensor) -> Tensor:
    """Seeds and streams, int64 [R] -> the rows' keys, int64 [R]."""
    return _mix(_mix(seeds + _INCREMENT) + (streams + 1) * _INCREMENT)


def draw_uniform(keys: Tensor, positions: Tensor, counters: Tensor) -> Tensor:
    """Uniform numbers in (0, 1), a pure function of its arguments: keys, positions int64 [R], counters int64 [R, N] -> fp32 [R, N].

    52 bits of hash are turned into a float, so that small values keep their relative precision down to 2**-53.
    """
    row_keys = _mix(keys + (positions + 1) * _INCREMENT)  # [R]
    hashed = _mix(row_keys[:, None] + (counters + 1) * _INCREMENT)  # [R, N]
    # The upper 52 bits as a whole number, then the centre of its cell; fp32 could round the last cell up to 1, hence the clamp.
    uniform = (_shift_right(hashed, 12).to(torch.float32) + 0.5) * 2.0**-52
    return uniform.clamp_(max=1 - 2.0**-24)


def draw_gumbel(keys: Tensor, positions: Tensor, counters: Tensor) -> Tensor:
    """Standard Gumbel noise, fp32 [R, N]: -log(-log(1 - u)), which is precise where it matters, at the large values (small u)."""
    return -torch.log(-torch.log1p(-draw_uniform(keys, positions, counters)))


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser: a bijection of 64-bit numbers in which every input bit flips about half of the output bits."""
    x = (x ^ _shift_right(x, 30)) * _MULTIPLIER_1
    x = (x ^ _shift_right(x, 27)) * _MULTIPLIER_2
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of int64: torch's own shift would drag the sign bit along."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _select_largest(logits: Tensor, limit: int, ordered: bool) -> Tensor:
    """Indices of the `limit` largest logits, int64 [R, limit]; among equals the lower index goes first, on every device.

    bf16 logits are full of equals (8 bits of precision), and which of them topk keeps is not specified; so the logit's bits and the
    index are combined into one whole number, all of which differ.
    """
    num_candidates = logits.shape[1]
    bits = (logits + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    rank = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # orders as the floats do
    backwards = torch.arange(num_candidates - 1, -1, -1, device=logits.device)
    combined = (rank.to(torch.int64) << 32) + backwards
    largest = combined.topk(limit, dim=-1, sorted=ordered).values
    return num_candidates - 1 - (largest & 0xFFFFFFFF)


def _check_number(name: str, value: float, least: float, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise InputError(f"{name} is {value!r}; allowed is a number from {least:g} to {most:g}")


def _check_whole(name: str, value: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise InputError(f"{name} is {value!r}; allowed is a whole number from 0 to {most}")
