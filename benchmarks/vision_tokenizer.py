"""The vision tokenizer on a CPU: pixels to codes and back, beside transformers' `Emu3VQVAE`, same random weights.

    python benchmarks/vision_tokenizer.py            about six minutes on two quiet cores
    python benchmarks/vision_tokenizer.py --quick    about one minute: the narrow network, one round

Two widths: the published one (256 channels, 271 M parameters) and a narrow one (64 channels), with the full codebook of 32,768.
A still of 256 x 256 pixels, and a clip of 16 frames (128 x 128 narrow, 64 x 64 at full width), in fp32 and in bf16. Beside the
default memory layout ours is also timed with channels_last weights. Each side is a process of its own, so that its peak memory
(resident set, weights included, reset before every case) is its own. Cases are interleaved, round by round; medians are printed.
Before anything is timed, the codes of all sides are compared, and after it what bf16 costs: the share of codes that stay the same
as in fp32, and the error of pixels decoded from the same codes.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from side_by_side import Worker, read_peak, serve

OURS, OURS_LAST, THEIRS = "openemu3", "openemu3 channels_last", "transformers"
SIDES = (OURS, OURS_LAST, THEIRS)
TARGETS = {"encode still": 3.5, "decode still": 6.0}
CHANNELS = {"narrow": 64, "full": 256}
CLIP_SIDE = {"narrow": 128, "full": 64}
STILL_SIDE, NUM_FRAMES = 256, 16


@dataclass(frozen=True)
class Setting:
    """A network, and how often its cases are timed."""

    width: str
    dtype: str
    rounds: int


def choose_settings(quick: bool, rounds: int | None) -> list[Setting]:
    if quick:
        return [Setting("narrow", dtype, rounds or 1) for dtype in ("float32", "bfloat16")]
    return [Setting(width, dtype, rounds or (3 if width == "narrow" else 2)) for width in CHANNELS for dtype in ("float32", "bfloat16")]


# ---- one side, in its own process


class Coder:
    """The network of one side, and its tasks."""

    def __init__(self, side: str, width: str, dtype: str) -> None:
        import torch

        from openemu3.tokenization.vision import VisionTokenizer, VisionTokenizerConfig, apply_channels_last

        torch.manual_seed(0)
        self.side, self.width, self.dtype = side, width, getattr(torch, dtype)
        self.config = VisionTokenizerConfig(channels=CHANNELS[width])
        tokenizer = VisionTokenizer(self.config).requires_grad_(False)
        torch.nn.init.normal_(tokenizer.quantize.embedding.weight, std=0.05)
        generator = torch.Generator().manual_seed(1)
        side_of_clip = CLIP_SIDE[width]
        self.inputs = {
            "encode still": torch.rand(1, 3, STILL_SIDE, STILL_SIDE, generator=generator) * 2 - 1,
            "encode clip": torch.rand(1, 3, NUM_FRAMES, side_of_clip, side_of_clip, generator=generator) * 2 - 1,
            "decode still": torch.randint(32768, (1, STILL_SIDE // 8, STILL_SIDE // 8), generator=generator),
            "decode clip": torch.randint(32768, (1, NUM_FRAMES // 4, side_of_clip // 8, side_of_clip // 8), generator=generator),
        }
        if side == THEIRS:
            self.network = self._convert(tokenizer)
        else:
            self.network = tokenizer.to(self.dtype)
            if side == OURS_LAST:
                apply_channels_last(self.network)

    def _convert(self, tokenizer: Any) -> Any:
        """Their module over the same memory."""
        import torch
        from transformers.models.emu3.configuration_emu3 import Emu3VQVAEConfig
        from transformers.models.emu3.modeling_emu3 import Emu3VQVAE

        from openemu3.model.layouts import to_transformers

        config = self.config
        with torch.device("meta"):
            theirs = Emu3VQVAE(Emu3VQVAEConfig(base_channels=config.channels, hidden_size=config.channels * config.channel_multipliers[-1]))
        state = to_transformers("vision_tokenizer", tokenizer.state_dict())
        theirs.load_state_dict({name.removeprefix("model.vqmodel."): tensor for name, tensor in state.items()}, strict=True, assign=True)
        return theirs.to(self.dtype).eval()

    def run(self, task: str) -> Any:
        """The codes or pixels of a task."""
        import torch

        given = self.inputs[task]
        if self.side == THEIRS:
            with torch.no_grad():
                if task.startswith("decode"):
                    pixels = self.network.decode(given)
                    return pixels if pixels.ndim == 4 else pixels.transpose(1, 2)
                frames = given if given.ndim == 4 else given.transpose(1, 2)
                uncropped = torch.tensor([[10**6, 10**6]])  # its cropping of clips confuses time with height
                return self.network.encode(frames.to(self.dtype), uncropped).image_tokens[0][None]
        if task.startswith("encode"):
            given = given.to(self.dtype)
        method = {
            "encode still": "encode_image",
            "decode still": "decode_image",
            "encode clip": "encode_video",
            "decode clip": "decode_video",
        }
        return getattr(self.network, method[task])(given)

    def work(self, task: str, save: str | None) -> dict[str, Any]:
        """save: file for the codes or pixels; neither its seconds nor its memory count."""
        begun = time.perf_counter()
        result = self.run(task)
        answer = {"seconds": time.perf_counter() - begun, "peak": read_peak()}
        if save:
            import numpy as np

            np.save(save, result.float().numpy())
        return answer


# ---- all sides


class Side(Worker):
    """A worker process."""

    def __init__(self, name: str, setting: Setting) -> None:
        super().__init__(__file__, ["--worker", name, "--width", setting.width, "--dtype", setting.dtype])

    def measure(self, task: str, save: Path | None = None) -> dict[str, Any]:
        return self.ask(task=task, save=str(save) if save else None)


TASKS = ("encode still", "decode still", "encode clip", "decode clip")


def run_setting(setting: Setting, folder: Path) -> list[dict[str, Any]]:
    """One result per task. The first round is not timed: it warms up, and leaves its codes and pixels in `folder`."""
    sides: dict[str, Side] = {}
    try:
        for name in SIDES:
            sides[name] = Side(name, setting)
        for task in TASKS:
            for name, side in sides.items():
                side.measure(task, folder / get_file_name(setting, name, task))
        results = []
        for task in TASKS:
            seconds: dict[str, list[float]] = {name: [] for name in SIDES}
            peaks = dict.fromkeys(SIDES, 0)
            for index in range(setting.rounds):
                for name in SIDES if index % 2 == 0 else tuple(reversed(SIDES)):
                    measured = sides[name].measure(task)
                    seconds[name].append(measured["seconds"])
                    peaks[name] = max(peaks[name], measured["peak"])
            medians = {name: statistics.median(times) for name, times in seconds.items()}
            result = asdict(setting) | {
                "task": task,
                "seconds": medians,
                "peak_bytes": peaks,
                "ratio": {name: medians[THEIRS] / medians[name] for name in (OURS, OURS_LAST)},
                "target": TARGETS.get(task),
                "against_theirs": {name: compare(folder, setting, name, THEIRS, task) for name in (OURS, OURS_LAST)},
            }
            results.append(result)
            print(format_result(result), flush=True)
        return results
    finally:
        for side in sides.values():
            side.close()


def get_file_name(setting: Setting, name: str, task: str) -> str:
    return f"{setting.width} {setting.dtype} {name} {task}.npy".replace(" ", "_")


def compare(folder: Path, setting: Setting, name: str, other: str, task: str, other_dtype: str | None = None) -> dict[str, float]:
    """Share of equal codes, or mean and largest difference of pixels."""
    import numpy as np

    other_setting = Setting(setting.width, other_dtype or setting.dtype, 0)
    one, two = np.load(folder / get_file_name(setting, name, task)), np.load(folder / get_file_name(other_setting, other, task))
    if task.startswith("encode"):
        return {"equal": float((one == two).mean())}
    return {"mean": float(np.abs(one - two).mean()), "largest": float(np.abs(one - two).max())}


def format_result(result: dict[str, Any]) -> str:
    seconds, ratio, peaks = result["seconds"], result["ratio"], result["peak_bytes"]
    best = max(ratio.values())
    verdict = "" if result["target"] is None else f" (target {result['target']:g}x: {'met' if best >= result['target'] else 'missed'})"
    agreement = "codes equal {equal:.1%}" if result["task"].startswith("encode") else "pixels differ by at most {largest:.1e}"
    return (
        f"{result['width']:<6} {result['dtype']:<8} {result['task']:<12} openemu3 {seconds[OURS]:7.3f} s, channels_last "
        f"{seconds[OURS_LAST]:7.3f} s, transformers {seconds[THEIRS]:7.3f} s   {ratio[OURS]:5.2f}x, {ratio[OURS_LAST]:5.2f}x{verdict}   "
        f"peak {peaks[OURS] / 2**20:,.0f}, {peaks[OURS_LAST] / 2**20:,.0f} / {peaks[THEIRS] / 2**20:,.0f} MiB   "
        + agreement.format(**result["against_theirs"][OURS])
    )


def measure_precision(settings: Sequence[Setting], folder: Path) -> list[dict[str, Any]]:
    """What bf16 and channels_last change, against our own fp32 in the default layout."""
    rows = []
    for width in dict.fromkeys(setting.width for setting in settings):
        for dtype, name in (("float32", OURS_LAST), ("bfloat16", OURS), ("bfloat16", OURS_LAST)):
            for task in ("encode still", "decode still"):
                difference = compare(folder, Setting(width, dtype, 0), name, OURS, task, other_dtype="float32")
                rows.append({"width": width, "dtype": dtype, "name": name, "task": task} | difference)
                described = (
                    f"{difference['equal']:.1%} of codes equal"
                    if "equal" in difference
                    else "pixels differ by {mean:.1e} on average, {largest:.1e} at most".format(**difference)
                )
                print(f"{width:<6} {dtype:<8} {name:<23} {task}: {described}, against fp32")
    return rows


def main() -> None:
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the narrow network alone, one round")
    parser.add_argument("--rounds", type=int, help="measurements of every task (default: 3 narrow, 2 at full width; quick: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--width", choices=CHANNELS, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        serve(Coder(arguments.worker, arguments.width, arguments.dtype).work)
        return
    began = time.perf_counter()
    print(
        f"vision tokenizer, codebook 32,768; {platform.processor() or platform.machine()}; still {STILL_SIDE}², clip of {NUM_FRAMES} frames"
    )
    settings = choose_settings(arguments.quick, arguments.rounds)
    with tempfile.TemporaryDirectory() as scratch:
        results = [result for setting in settings for result in run_setting(setting, Path(scratch))]
        precision = measure_precision(settings, Path(scratch))
    print(f"in {time.perf_counter() - began:.0f} s")
    if arguments.json:
        arguments.json.write_text(json.dumps({"results": results, "precision": precision}, indent=2) + "\n")


if __name__ == "__main__":
    main()
