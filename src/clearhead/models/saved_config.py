"""What the configurations of all families share: how they are saved and read, and when maps may be asked for."""

import json
import os
from typing import Any, Self

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from clearhead.models.autoload import (
    AutoMap,
    auto_map,
    family_of,
    is_own,
    tell_peft,
    without_own,
    write_module,
)

# The attn_implementation of models that chooses a backend for each forward pass, as `backend="auto"` does for a layer.
AUTOMATIC = "clearhead"


@strict
class SavedConfig(PreTrainedConfig):
    """A configuration of this package: saved with what lets any tool of Hugging Face load its model."""

    auto_map = AutoMap()

    def __post_init__(self, **kwargs: Any) -> None:
        if others := without_own(kwargs.pop("auto_map", None), family_of(type(self))):
            kwargs["auto_map"] = others
        super().__post_init__(**kwargs)

    # Hugging Face allows maps with "eager" only; a model that chooses by itself finds the engine that has them.
    @property
    def output_attentions(self) -> bool:
        """Whether forward passes return effective maps unless told otherwise."""
        return bool(self._output_attentions)

    @output_attentions.setter
    def output_attentions(self, value: bool) -> None:
        previous, self._output_attentions = self._output_attentions, value
        try:
            self.validate_output_attentions()
        except ValueError:
            self._output_attentions = previous
            raise

    def validate_output_attentions(self) -> None:
        """Part of the strict validation: raises for maps from an implementation named that may not have them."""
        if self._attn_implementation != AUTOMATIC:
            super().validate_output_attentions()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Self:
        """As Hugging Face's, but another model's configuration is an error, not a warning."""
        found = config_dict.get("model_type", cls.model_type)
        if found != cls.model_type:
            raise ValueError(
                f"this is the configuration of a {found!r} model, not of a {cls.model_type!r} one"
            )
        made: Self = super().from_dict(config_dict, **kwargs)
        return made

    def to_dict(self) -> dict[str, Any]:
        """As Hugging Face's. PEFT reads it before it looks for the default target modules of a model's type."""
        tell_peft(self.model_type)
        found: dict[str, Any] = super().to_dict()
        return found

    def to_json_file(self, json_file_path: str | os.PathLike[str], use_diff: bool = True) -> None:
        """Write it with the `auto_map` that lets tools without this library's import load what it belongs to."""
        values = json.loads(self.to_json_string(use_diff=use_diff))
        values["auto_map"] = auto_map(family_of(type(self))) | values.get("auto_map", {})
        with open(json_file_path, "w", encoding="utf-8") as file:
            file.write(json.dumps(values, indent=2, sort_keys=True) + "\n")

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """As Hugging Face's, with the module that `auto_map` names beside it."""
        if not os.path.isfile(save_directory):
            write_module(save_directory, family_of(type(self)))
        if self._auto_class is not None:
            self.auto_map = dict(self.auto_map)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing to do here: what is saved names its classes already. Subclasses are saved with their source."""
        if not is_own(cls):
            super().register_for_auto_class(auto_class)
