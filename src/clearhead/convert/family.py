"""What LLaMA's relatives of transformers have in common: names, configuration, and what this library does not have."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from clearhead.convert.base import INVALID, LAYER, Computation, Converter, NameLine, NameTable, Source, refuse
from clearhead.convert.computing import ModelComputation
from clearhead.convert.orders import pairs_to_halves
from clearhead.convert.weights import ConversionError, Weights, reason, same
from clearhead.models.config import ClearheadConfig
from clearhead.positions.interchange import from_transformers, to_transformers

ENDS = ("model.embed_tokens.weight", "model.norm.weight")
MLP = tuple(
    f"model.layers.{LAYER}.{part}.weight"
    for part in (
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
        "input_layernorm",
        "post_attention_layernorm",
    )
)
ATTENTION = f"model.layers.{LAYER}.self_attn"
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "initializer_range",
    "max_position_embeddings",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)


def frame(config: ClearheadConfig) -> list[NameLine]:
    """The lines around attention, whose names are LLaMA's here too."""
    head = () if config.tie_word_embeddings else ("lm_head.weight",)
    return [NameLine(name, name) for name in (*ENDS, *head, *MLP)]


def to_halves(config: ClearheadConfig) -> Callable[[Tensor], Tensor]:
    """Rows of our query and key projections, of either layout, in the layout "half"."""
    if layout_of(config) == "half":
        return same
    assert config.head_dim is not None
    width = config.head_dim
    return lambda rows: pairs_to_halves(rows, width)


def layout_of(config: ClearheadConfig) -> str:
    """Which components our model's rotation pairs."""
    return str((config.rope_parameters or {}).get("layout", "half"))


class LlamaFamily(Converter):
    """A model of transformers with LLaMA's names. Subclasses say which one, and what of it has no form here."""

    model_type: ClassVar[str]
    class_name: ClassVar[str]

    def claims(self, source: Source) -> bool:
        return source.model_type == self.model_type

    def check(self, config: Any) -> None:
        """Raise ConversionError, naming the key, for what this library's models do not have."""

    def attention(self, config: Any) -> tuple[str, dict[str, Any]]:
        """The variant that this format is, and its options."""
        return "softmax", {}

    def configuration(self, source: Source) -> ClearheadConfig:
        theirs = self._theirs(source.config)
        self._check_all(theirs, source)
        try:
            rope = from_transformers(theirs)
        except ValueError as error:
            raise ConversionError(
                f"the configuration's rope_parameters cannot be taken over: {error}"
            ) from None
        attention, options = self.attention(theirs)
        sizes = {name: getattr(theirs, name) for name in SIZES}
        return ClearheadConfig(
            **sizes,
            head_dim=getattr(theirs, "head_dim", None),
            attention=attention,
            attention_options=options,
            rope_parameters=rope,
            **windows(theirs),
        )

    def table(self, config: ClearheadConfig) -> NameTable:
        turned = to_halves(config)
        lines = [
            NameLine(f"{ATTENTION}.{part}.weight", f"{ATTENTION}.{part}.weight", back=back)
            for part, back in (("q_proj", turned), ("k_proj", turned), ("v_proj", same), ("o_proj", same))
        ]
        return NameTable((*frame(config), *lines), config.num_hidden_layers)

    def computation(self, config: Mapping[str, Any], weights: Weights, dtype: torch.dtype) -> Computation:
        return ModelComputation(self._class(), self._theirs(config), dtype)

    def shapes(self, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        theirs = self._theirs(config)
        with torch.device("meta"):
            model = self._class()(theirs)
        tied = {"lm_head.weight"} if theirs.tie_word_embeddings else set()
        return {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in tied}

    def _class(self) -> Any:
        import transformers

        return getattr(transformers, self.class_name)

    def _theirs(self, config: Mapping[str, Any]) -> Any:
        try:
            return self._class().config_class.from_dict(dict(config))
        except INVALID as error:
            raise ConversionError(
                f"the configuration is not one of a {self.model_type!r} model: {reason(error)}"
            ) from None

    def _check_all(self, theirs: Any, source: Source) -> None:
        name = (source.config.get("architectures") or [self.class_name])[0]
        if name != self.class_name:
            raise refuse("architectures", name, f"only {self.class_name} can be converted")
        if source.config.get("quantization_config"):
            method = source.config["quantization_config"].get("quant_method", "?")
            raise refuse("quantization_config", method, "convert the model that it was made from")
        if theirs.hidden_act not in ("silu", "swish"):
            raise refuse("hidden_act", theirs.hidden_act, "clearhead models have SwiGLU, 'silu'")
        for key in ("attention_bias", "mlp_bias"):
            if getattr(theirs, key, False):
                raise refuse(key, True, "clearhead models have no biases")
        if dropout := getattr(theirs, "attention_dropout", 0.0):
            raise refuse("attention_dropout", dropout, "clearhead has no dropout on maps; set it to 0.0")
        self.check(theirs)


def windows(theirs: Any) -> dict[str, Any]:
    """The keys of our configuration that say which layers have a sliding window; none where no layer's is in use."""
    window = getattr(theirs, "sliding_window", None)
    # Beyond the trained length it hides nothing that the model was made for.
    if window is None or window >= theirs.max_position_embeddings:
        return {}
    kinds = list(getattr(theirs, "layer_types", None) or ["sliding_attention"] * theirs.num_hidden_layers)
    if unknown := set(kinds) - {"sliding_attention", "full_attention"}:
        raise refuse("layer_types", sorted(unknown)[0], "clearhead layers see all tokens or a window of them")
    if len(set(kinds)) == 1:
        return {"sliding_window": window} if kinds[0] == "sliding_attention" else {}
    return {"layers": [{"sliding_window": window} if kind == "sliding_attention" else {} for kind in kinds]}


def rope_for(config: ClearheadConfig, what: str) -> tuple[dict[str, Any], int]:
    """Rotary parameters of one of our models as transformers has them, and the max_position_embeddings for them.

    ConversionError, naming the key, where no model of transformers has its positions.
    """
    for name in ("layers", "sliding_window"):
        if getattr(config, name) is not None:
            raise refuse(name, getattr(config, name), f"{what} has one kind of layer, which sees all tokens")
    mixed = set(config.positions_by_layer)
    if mixed != {"rope"}:
        key = next(
            name
            for name, given in (
                ("layer_positions", config.layer_positions is not None),
                ("nope_interval", config.nope_interval is not None),
                ("position", True),
            )
            if given
        )
        raise refuse(key, getattr(config, key), f'{what} has the position "rope" in every layer')
    assert config.head_dim is not None
    parameters = {key: value for key, value in (config.rope_parameters or {}).items() if key != "layout"}
    length = config.max_position_embeddings
    if parameters.get("rope_type") == "dynamic":
        length = parameters.get("original_max_position_embeddings") or length
    try:
        return to_transformers(parameters, config.head_dim, length), length
    except ValueError as error:
        raise ConversionError(f"{what} cannot have this model's rope_parameters: {error}") from None


def shared_keys(config: ClearheadConfig) -> dict[str, Any]:
    """The keys that our configuration and theirs have under one name."""
    return {name: getattr(config, name) for name in SIZES if name != "max_position_embeddings"}
