"""What needs which installation extra, and the one sentence for a package that is missing."""

import importlib.util

# Extra -> the modules that its own packages bring, by their import names. Those of `INCLUDES` come with it.
EXTRAS = {
    "hf": ("transformers", "safetensors", "typer", "rich", "pydantic", "tomli_w"),
    "report": ("jinja2", "matplotlib", "scipy"),
    "train": ("accelerate", "datasets", "tensorboard", "tokenizers"),
    "judges": ("httpx2",),
    "gguf": ("gguf",),
    "lm-eval": ("lm_eval",),
    "adapters": ("peft",),
    "triton": ("triton",),
}
INCLUDES = {
    "report": ("hf",),
    "train": ("report",),
    "judges": ("train",),
    "gguf": ("train",),
    "lm-eval": ("train",),
    "adapters": ("train",),
}
# Verb of the command line -> the extra it needs.
VERBS = {
    "compare": "train",
    "scale": "train",
    "tokenize": "train",
    "train": "train",
    "evaluate": "train",
    "explain": "train",
    "report": "report",
    "card": "report",
    "bench": "report",
    "look": "train",
    "generate": "hf",
    "chat": "hf",
    "doctor": "hf",
    "convert": "hf",
    "retrofit": "hf",
}


class MissingExtra(ImportError, ValueError):
    """A package of an extra is not installed; the message names the package and how to install it.

    A ValueError too, because it is an error that a person can mend: the command line ends with its sentence.
    """


def modules(extra: str) -> tuple[str, ...]:
    """Import names of everything that `extra` brings, what it includes first."""
    included = [name for other in INCLUDES.get(extra, ()) for name in modules(other)]
    return (*included, *EXTRAS[extra])


def need(what: str, extra: str) -> None:
    """Raise `MissingExtra` unless the packages of `extra` are installed, none of which is imported for that.

    what: the subject of the sentence, "clearhead compare" in "clearhead compare needs transformers: pip install
        'clearhead[train]'".
    """
    for module in modules(extra):
        if importlib.util.find_spec(module) is None:
            raise MissingExtra(f"{what} needs {module}: pip install 'clearhead[{extra}]'")
