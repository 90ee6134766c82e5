"""openemu3: the open, complete Emu3 (arXiv 2409.18869).

`openemu3.Emu3` is the way in. It is imported when first asked for, so that light uses (the format, the records) stay light.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["Emu3", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "Emu3":
        from openemu3.generation.tasks import Emu3

        return Emu3
    raise AttributeError(f"module 'openemu3' has no attribute {name!r}; it offers {', '.join(__all__)}")
