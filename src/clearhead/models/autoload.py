"""What stands beside saved weights, so that tools which know only transformers can load them.

A saved configuration names a small module, and that module the classes of the installed package: no code of this
library is copied, and with the package imported the module is never looked at.
"""

import os
import sys
from pathlib import Path
from typing import Any

# Of each family, by the `model_type` of its configuration: Hugging Face's Auto classes and what they make.
FAMILIES = {
    "clearhead": {
        "AutoConfig": "ClearheadConfig",
        "AutoModel": "ClearheadModel",
        "AutoModelForCausalLM": "ClearheadForCausalLM",
        "AutoModelForSequenceClassification": "ClearheadForSequenceClassification",
        "AutoModelForTokenClassification": "ClearheadForTokenClassification",
        "AutoModelForQuestionAnswering": "ClearheadForQuestionAnswering",
    },
    "clearhead_encoder": {
        "AutoConfig": "ClearheadEncoderConfig",
        "AutoModel": "ClearheadEncoderModel",
        "AutoModelForMaskedLM": "ClearheadForMaskedLM",
        "AutoModelForSequenceClassification": "ClearheadEncoderForSequenceClassification",
        "AutoModelForTokenClassification": "ClearheadEncoderForTokenClassification",
        "AutoModelForQuestionAnswering": "ClearheadEncoderForQuestionAnswering",
        "AutoModelForMultipleChoice": "ClearheadEncoderForMultipleChoice",
    },
    "clearhead_seq2seq": {
        "AutoConfig": "ClearheadSeq2SeqConfig",
        "AutoModel": "ClearheadSeq2SeqModel",
        "AutoModelForSeq2SeqLM": "ClearheadForConditionalGeneration",
    },
}
MODULE = "modeling_clearhead"
MODULE_FILE = f"{MODULE}.py"


def family_of(config_class: type) -> str:
    """The family of a configuration: its own, or that of the class here that it comes from."""
    return next(
        kind for base in config_class.__mro__ if (kind := vars(base).get("model_type", "")) in FAMILIES
    )


def auto_map(family: str) -> dict[str, str]:
    """What a saved configuration of the family names its classes by."""
    return {auto: f"{MODULE}.{name}" for auto, name in FAMILIES[family].items()}


def module_text(family: str) -> str:
    """The module that `auto_map` names."""
    # In a `try` transformers does not look for packages that are missing, so the sentence is this one.
    return f'''"""The classes of this model, from the package clearhead: what trust_remote_code=True imports."""

try:
    from clearhead.models import (
{"".join(f"        {name},{chr(10)}" for name in FAMILIES[family].values())}    )
except ModuleNotFoundError as error:
    if error.name != "clearhead":
        raise
    raise ImportError("this model needs the package clearhead, which is not installed: pip install clearhead") from None
except ImportError as error:
    raise ImportError(f"this model needs a newer clearhead ({{error}}): pip install --upgrade clearhead") from None
'''


class AutoMap:
    """`config.auto_map` of a configuration that was not given one of its own: what is written to its file.

    Some tools look here for whether a model can be loaded by the Auto classes. It is no part of `to_dict`.
    """

    def __get__(self, config: Any, owner: type) -> dict[str, str]:
        return auto_map(family_of(owner))


def write_module(folder: str | os.PathLike[str], family: str) -> None:
    """Put the family's module into `folder`, which is made if it is missing."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / MODULE_FILE).write_text(module_text(family), encoding="utf-8")


def without_own(saved: dict[str, str] | None, family: str) -> dict[str, str]:
    """The entries of a saved `auto_map` that others made."""
    own = auto_map(family)
    return {key: value for key, value in (saved or {}).items() if own.get(key) != value}


def is_own(cls: type) -> bool:
    """Whether a class is this package's, not a subclass of somebody else's."""
    return cls.__module__.partition(".")[0] == __name__.partition(".")[0]


def tell_peft(model_type: str) -> None:
    """Give PEFT, where it is imported, the default target modules of this family: LLaMA's, whose names it shares."""
    constants = sys.modules.get("peft.utils.constants")
    if constants is None:
        return
    for name, table in list(vars(constants).items()):
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(table, dict) and "llama" in table:
            table.setdefault(model_type, table["llama"])
