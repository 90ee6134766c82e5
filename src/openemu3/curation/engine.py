"""Daft, the engine that curation runs on: in this process, or on a Ray cluster.

In: which of the two. Out: the module `daft`, set up. The surprising thing: nothing else in this package may import Daft or Ray
themselves, because both report their use to their makers from the moment they are imported, unless told not to before.
"""

from __future__ import annotations

import os
from types import ModuleType
from typing import Literal

from openemu3.records import InputError

Runner = Literal["native", "ray"]

# Read by daft/scarf_telemetry.py at import, and by ray._private.usage when a cluster starts.
_NO_REPORTS = {"DAFT_ANALYTICS_ENABLED": "0", "DO_NOT_TRACK": "1", "SCARF_NO_ANALYTICS": "1", "RAY_USAGE_STATS_ENABLED": "0"}


def import_daft() -> ModuleType:
    """The module, without telemetry. Raises InputError where it is not installed."""
    os.environ.update(_NO_REPORTS)
    os.environ.setdefault("DAFT_PROGRESS_BAR", "0")  # the command line has its own
    try:
        import daft
    except ImportError as error:
        raise InputError("curation needs Daft, which is not installed; install it with: pip install 'openemu3[curation]'") from error
    return daft


def start_engine(runner: Runner = "native", address: str | None = None) -> ModuleType:
    """Daft with the runner chosen.

    runner  "native": threads of this process; "ray": a Ray cluster.
    address of a running cluster, "ray://host:10001" or "auto"; None starts a local one.
    Raises InputError if Ray is wanted and not installed. A process has one runner for its whole life; asking for the other raises
    InputError.
    """
    daft = import_daft()
    if runner == "ray":
        try:
            import ray
        except ImportError as error:
            raise InputError("runner is ray, which is not installed; install it with: pip install 'openemu3[curation,cluster]'") from error
        if not ray.is_initialized():
            ray.init(address=address, runtime_env={"env_vars": _NO_REPORTS}, include_dashboard=None if address else False)
        daft.set_runner_ray(address=address, noop_if_initialized=True)
    active = daft.get_or_create_runner().name  # the native one, where none was set
    if active != runner:
        raise InputError(f"runner is {runner}, but this process already works with the runner {active}; start another process")
    return daft
