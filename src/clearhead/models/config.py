"""The configuration of a clearhead model."""

import inspect
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from clearhead.core.heads import HeadShape
from clearhead.positions.base import Position
from clearhead.registry import did_you_mean, resolve
from clearhead.variants.base import Variant

# The attn_implementation of models that chooses a backend for each forward pass, as `backend="auto"` does for a layer.
AUTOMATIC = "clearhead"


@strict
class ClearheadConfig(PreTrainedConfig):
    """Sizes and choices of a decoder as LLaMA's (pre-RMSNorm, SwiGLU, no biases) with any attention and position.

    num_attention_heads, num_key_value_heads and head_dim count as for the Transformer twin, whatever the variant
    makes of them: two configurations that differ in `attention` alone are twins.

    attention:          a registered variant: softmax, differential, differential_v2, collinear.
    attention_options:  its keyword arguments, for example {"mode": "slack"} for collinear.
    position:           a registered position: rope, nope.
    rope_parameters:    {"rope_type": "default", "rope_theta": 10000.0} as in transformers.
    intermediate_size:  by default 8/3 · hidden_size rounded up to a multiple of 64.
    initializer_range:  standard deviation of all matrices at the start; embedding_initializer_range: of the token
        embedding, by default the same. A small model learns to look things up far sooner when its (untied) embedding
        starts large beside what the layers add to it.
    num_key_value_heads, head_dim: by default num_attention_heads and hidden_size / num_attention_heads.
    Raises ValueError for an unknown name or option and for sizes that do not fit, naming the key.
    """

    model_type = "clearhead"
    keys_to_ignore_at_inference: ClassVar = ["past_key_values"]

    vocab_size: int = 32000
    hidden_size: int = 512
    intermediate_size: int | None = None
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    attention: str = "softmax"
    attention_options: dict[str, Any] | None = None
    position: str = "rope"
    rope_parameters: dict[str, Any] | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    embedding_initializer_range: float | None = None
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.head_dim is None:
            if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size ({self.hidden_size}) is not a multiple of num_attention_heads "
                    f"({self.num_attention_heads}); give head_dim"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = -(-8 * self.hidden_size // (3 * 64)) * 64
        if self.attention_options is None:
            self.attention_options = {}
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
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "ClearheadConfig":
        """As Hugging Face's, but another model's configuration is an error, not a warning."""
        found = config_dict.get("model_type", cls.model_type)
        if found != cls.model_type:
            raise ValueError(
                f"this is the configuration of a {found!r} model, not of a {cls.model_type!r} one"
            )
        made: ClearheadConfig = super().from_dict(config_dict, **kwargs)
        return made

    def validate_architecture(self) -> None:
        """Part of the strict validation: raises for what no model can be built from."""
        for name in ("vocab_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if not self.rms_norm_eps > 0:
            raise ValueError(f"rms_norm_eps must be positive, not {self.rms_norm_eps}")
        try:
            self.make_variant(0)
        except ValueError as error:
            raise ValueError(_in_our_terms(str(error))) from None
        self.make_position()

    def head_shape(self, layer_idx: int) -> HeadShape:
        """The twin's head counts for one layer."""
        assert self.head_dim is not None and self.num_key_value_heads is not None
        return HeadShape(
            self.hidden_size, self.num_attention_heads, self.num_key_value_heads, self.head_dim, layer_idx
        )

    def make_variant(self, layer_idx: int) -> Variant:
        """The variant of one layer; ValueError if the options are not its own."""
        variant = resolve("variants", self.attention)
        options = dict(self.attention_options or {})
        known = [name for name in inspect.signature(variant).parameters if name != "shape"]
        for name in options:
            if name not in known:
                raise ValueError(
                    f"attention {self.attention!r} has no option {name!r}: {did_you_mean(name, known)}"
                )
        if variant.needs_rotation and not resolve("positions", self.position).rotates:
            raise ValueError(
                f"attention {self.attention!r} is defined by rotary angles: it needs a rotary position, "
                f"not {self.position!r}"
            )
        made: Variant = variant(self.head_shape(layer_idx), **options)
        return made

    def make_position(self) -> Position:
        """The position method of the whole model."""
        position = resolve("positions", self.position)
        assert self.head_dim is not None
        made: Position = position.from_rope_parameters(self.head_dim, self.rope_parameters or {})
        return made


def _in_our_terms(message: str) -> str:
    """The layers' argument names as this configuration's keys."""
    for theirs, ours in (
        ("num_kv_heads", "num_key_value_heads"),
        ("num_heads", "num_attention_heads"),
        ("embed_dim", "hidden_size"),
    ):
        message = message.replace(theirs, ours)
    return message
