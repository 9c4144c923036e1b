"""The configuration of a clearhead model."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from clearhead.core.heads import HeadShape
from clearhead.positions.base import Position
from clearhead.registry import resolve
from clearhead.variants.base import Variant, make_variant

# The attn_implementation of models that chooses a backend for each forward pass, as `backend="auto"` does for a layer.
AUTOMATIC = "clearhead"


@strict
class ClearheadConfig(PreTrainedConfig):
    """Sizes and choices of a decoder as LLaMA's (pre-RMSNorm, SwiGLU, no biases) with any attention and position.

    num_attention_heads, num_key_value_heads and head_dim count as for the Transformer twin, whatever the variant
    makes of them: two configurations that differ in `attention` alone are twins.

    attention:          a registered variant: softmax, differential, differential_v2, collinear,
        differential_collinear, differential_v2_collinear.
    attention_options:  its keyword arguments, for example {"mode": "slack"} for collinear.
    position:           a registered position: rope, xpos, alibi, nope.
    rope_parameters:    {"rope_type": "default", "rope_theta": 10000.0} as in transformers, or a scaling: rope_type
        linear, ntk, dynamic, yarn, llama3 or longrope with its keys; and "layout", "half" or "interleaved".
    max_position_embeddings: the length trained with, which scalings count from unless
        original_max_position_embeddings in `rope_parameters` says otherwise. It bounds nothing.
    layer_positions:    a position for each layer, in place of one `position` for all.
    nope_interval:      n ≥ 2: every n-th layer, n−1, 2n−1, ... counted from 0, has "nope" in place of `position`, as
        SmolLM3's no_rope_layer_interval does.
    intermediate_size:  by default 8/3 · hidden_size rounded up to a multiple of 64.
    initializer_range:  standard deviation of all matrices at the start; embedding_initializer_range: of the token
        embedding, by default the same. A small model learns to look things up far sooner when its (untied) embedding
        starts large beside what the layers add to it.
    compact_cache:      caches of collinear variants hold half of every key, a quarter less in all; positions behind a
        cache are then always counted from the mask.
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
    layer_positions: list[str] | None = None
    nope_interval: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    embedding_initializer_range: float | None = None
    tie_word_embeddings: bool = False
    use_cache: bool = True
    compact_cache: bool = False
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

    def validate_rope(self) -> None:
        """Part of the strict validation that `make_positions` does here: it knows more keys and is stricter."""

    def validate_architecture(self) -> None:
        """Part of the strict validation: raises for what no model can be built from."""
        for name in ("vocab_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if not self.rms_norm_eps > 0:
            raise ValueError(f"rms_norm_eps must be positive, not {self.rms_norm_eps}")
        self._check_layer_positions()
        try:
            variant = self.make_variant(0)
        except ValueError as error:
            raise ValueError(_in_our_terms(str(error))) from None
        if self.compact_cache and variant.placement is None:
            raise ValueError(
                f"compact_cache is for collinear variants, whose keys are half redundant: "
                f"attention is {self.attention!r}"
            )
        self._check_rotation()
        self.make_positions()

    def _check_layer_positions(self) -> None:
        if self.layer_positions is not None and self.nope_interval is not None:
            raise ValueError("give layer_positions or nope_interval, not both")
        if self.layer_positions is not None and len(self.layer_positions) != self.num_hidden_layers:
            raise ValueError(
                f"layer_positions has {len(self.layer_positions)} names; expected num_hidden_layers "
                f"({self.num_hidden_layers}), one a layer"
            )
        if self.nope_interval is not None and self.nope_interval < 2:
            raise ValueError(
                f'nope_interval must be at least 2, not {self.nope_interval}; position "nope" is for all layers'
            )

    def _check_rotation(self) -> None:
        """Collinear variants are functions of rotary angles; without any they are another mechanism."""
        if not resolve("variants", self.attention).needs_rotation:
            return
        for layer, name in enumerate(self.positions_by_layer):
            if resolve("positions", name).rotates:
                continue
            key = "position"
            if self.layer_positions is not None:
                key = f"layer_positions[{layer}]"
            elif self.nope_interval is not None:
                key = f"nope_interval ({self.nope_interval})"
            raise ValueError(
                f"attention {self.attention!r} is defined by rotary angles: {key} must give every layer a rotary "
                f"position, not {name!r}"
            )

    @property
    def positions_by_layer(self) -> tuple[str, ...]:
        """The name of each layer's position."""
        if self.layer_positions is not None:
            return tuple(self.layer_positions)
        interval = self.nope_interval
        return tuple(
            "nope" if interval is not None and (layer + 1) % interval == 0 else self.position
            for layer in range(self.num_hidden_layers)
        )

    def head_shape(self, layer_idx: int) -> HeadShape:
        """The twin's head counts for one layer."""
        assert self.head_dim is not None and self.num_key_value_heads is not None
        return HeadShape(
            self.hidden_size, self.num_attention_heads, self.num_key_value_heads, self.head_dim, layer_idx
        )

    def make_variant(self, layer_idx: int) -> Variant:
        """The variant of one layer; ValueError if the options are not its own."""
        return make_variant(self.attention, self.head_shape(layer_idx), self.attention_options or {})

    def make_positions(self) -> dict[str, Position]:
        """The position methods that the layers use, by name: one instance for all layers of a name."""
        assert self.head_dim is not None
        made: dict[str, Position] = {}
        methods = {name: resolve("positions", name) for name in dict.fromkeys(self.positions_by_layer)}
        # In a mix they are those of the layers that turn.
        if not any(method.rotates for method in methods.values()):
            for method in methods.values():
                method.check_scaling(self.rope_parameters or {})
        for name, method in methods.items():
            made[name] = method.from_rope_parameters(
                self.head_dim, self.rope_parameters or {}, self.max_position_embeddings
            )
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
