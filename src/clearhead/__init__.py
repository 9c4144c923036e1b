"""clearhead: attention that ignores noise and keeps working past its training length.

`clearhead.nn` has the layers, `clearhead.functional` the operations, `clearhead.models` the Hugging Face models,
`clearhead.integrations` the kernels in other models, `clearhead.testing` the checks for what you add to it;
`clearhead.show` displays a model's attention in a notebook. All are imported when they are first named, so
`import clearhead` costs next to nothing.
"""

from importlib import import_module
from typing import Any

__all__ = ["functional", "integrations", "models", "nn", "show", "testing"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "show":
        return import_module("clearhead.look.notebook").show
    if name in __all__:
        return import_module(f"clearhead.{name}")
    raise AttributeError(f"module 'clearhead' has no attribute {name!r}")
