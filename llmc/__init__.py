"""llmc: train language models without PyTorch, as fast as the hardware allows.

    import llmc
    model = llmc.load("d12")
    for event in llmc.train(llmc.TrainConfig(...)):
        print(event)

Names are loaded when first used, so `import llmc` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "load": "loading",
    "save": "loading",
    "train": "training",
    "TrainConfig": "training",
    "Started": "training",
    "Step": "training",
    "Validation": "training",
    "Sample": "training",
    "generate": "sampling",
    "Sampling": "choice",
    "Chat": "chat",
    "LlmcError": "errors",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'llmc' has no attribute {name!r}")
    value = getattr(import_module(f"llmc.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
