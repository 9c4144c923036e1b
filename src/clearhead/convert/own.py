"""This library's own checkpoints: carried over as they are, and what every other format is turned into."""

from collections.abc import Mapping
from typing import Any

import torch

from clearhead.convert.base import INVALID, Computation, Converter, NameLine, NameTable, Source, refuse
from clearhead.convert.computing import ModelComputation
from clearhead.convert.weights import ConversionError, Weights, reason
from clearhead.models.autoload import FAMILIES, MODULE_FILE, auto_map, module_text
from clearhead.models.config import ClearheadConfig

LANGUAGE_MODEL = "ClearheadForCausalLM"


class Clearhead(Converter):
    """`ClearheadForCausalLM`, any attention."""

    exports = True

    def claims(self, source: Source) -> bool:
        return source.model_type == ClearheadConfig.model_type

    def configuration(self, source: Source) -> ClearheadConfig:
        found = source.config.get("architectures") or [LANGUAGE_MODEL]
        if found[0] != LANGUAGE_MODEL and found[0] in FAMILIES[ClearheadConfig.model_type].values():
            raise refuse("architectures", found[0], f"only {LANGUAGE_MODEL} can be converted")
        try:
            return ClearheadConfig.from_dict(dict(source.config))
        except INVALID as error:
            raise ConversionError(
                f"the configuration is not one of a clearhead model: {reason(error)}"
            ) from None

    def table(self, config: ClearheadConfig) -> NameTable:
        return NameTable(
            tuple(NameLine(name, name) for name in self.shapes(config.to_dict())), config.num_hidden_layers
        )

    def computation(self, config: Mapping[str, Any], weights: Weights, dtype: torch.dtype) -> Computation:
        from clearhead.models.causal import ClearheadForCausalLM

        return ModelComputation(ClearheadForCausalLM, ClearheadConfig.from_dict(dict(config)), dtype)

    def written(self, config: ClearheadConfig) -> dict[str, Any]:
        return {
            **config.to_diff_dict(),
            "architectures": [LANGUAGE_MODEL],
            "auto_map": auto_map(config.model_type),
        }

    def beside(self) -> dict[str, str]:
        return {MODULE_FILE: module_text(ClearheadConfig.model_type)}

    def shapes(self, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        from clearhead.models.causal import ClearheadForCausalLM

        ours = ClearheadConfig.from_dict(dict(config))
        with torch.device("meta"):
            model = ClearheadForCausalLM(ours)
        tied = {"lm_head.weight"} if ours.tie_word_embeddings else set()
        return {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in tied}
