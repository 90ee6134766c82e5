"""Every benchmark of this folder, one after the other, each beside what people use now: what `make bench` runs.

    python benchmarks/run.py            about 25 minutes on two quiet cores
    python benchmarks/run.py --quick    about five minutes, rough numbers
    python benchmarks/train_step.py     each of them alone, with all of its cases

Each prints its ratios; the results also go to one JSON file. The surprising thing: they are separate processes, so that none inherits
another's memory, threads or warm caches.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

# Name and flags. The step's own default takes a quarter of an hour and 15 GB by itself.
BENCHMARKS: dict[str, tuple[str, ...]] = {
    "vision_tokenizer": (),
    "generation": (),
    "tokenization": ("--quick",),
    "loader": (),
    "train_step": ("--quick",),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer cases, one round")
    parser.add_argument("--json", type=Path, metavar="FILE", default=Path("outputs/bench.json"), help="where the results go")
    arguments = parser.parse_args()
    results = {}
    for name, flags in BENCHMARKS.items():
        print(f"\n== {name}\n", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "results.json"
            command = [sys.executable, str(Path(__file__).with_name(f"{name}.py")), "--json", str(path)]
            subprocess.run(command + (["--quick"] if arguments.quick else list(flags)), check=True)
            results[name] = json.loads(path.read_text(encoding="utf-8"))
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"\nresults -> {arguments.json}")


if __name__ == "__main__":
    main()
