"""The configuration of an encoder-decoder: one for each side, and what stands between them."""

from dataclasses import fields
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from clearhead.models.config import ClearheadConfig
from clearhead.models.encoder_config import ClearheadEncoderConfig
from clearhead.models.saved_config import SavedConfig
from clearhead.positions.base import Position
from clearhead.registry import resolve
from clearhead.variants.base import Variant, make_variant, option_names

SIDES = ("encoder", "decoder")
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
# Keys of both sides, which may be given once for both; the others say something of a whole model or of no encoder.
FLAT = frozenset(
    {field.name for field in fields(ClearheadConfig)}
    - {field.name for field in fields(PreTrainedConfig)}
    - {"tie_word_embeddings", "use_cache", "compact_cache", "twin_heads", *_TOKENS}
)


@strict
class ClearheadSeq2SeqConfig(SavedConfig):
    """Sizes and choices of an encoder-decoder, each side with any attention and position.

    encoder, decoder: tables with the keys of `ClearheadEncoderConfig` and `ClearheadConfig`, or such configurations.
        Keys that both have (vocab_size, hidden_size, attention, position, ...) may be given once for both, beside the
        tables; a table's own key goes before them. Two configurations that differ in `attention` alone are twins. Read
        from here, such a key is the decoder's; set here, it is set on both sides.
    cross_attention:  a registered variant for the attention of the decoder to the encoder. By default the decoder's;
        where that one is defined by rotary angles and `cross_position` has none, what it is without them: softmax for
        collinear, differential and differential_v2 for their collinear forms.
    cross_attention_options: its keyword arguments, by default those of the decoder's that it has too.
    cross_position:   what positions mean between the two sequences: "nope", nothing, or "rope", where a query is turned
        by its place in the target and a key by its place in the source, both counted from 0 over real tokens, with the
        decoder's `rope_parameters`. Collinear cross-attention is defined by these angles and needs them. Refused: xpos,
        whose factor grows without bound for keys behind the query, and alibi, whose slopes are made for distances
        within one causal sequence.
    tie_word_embeddings: encoder, decoder and the head have one matrix, as in T5 and BART.
    decoder_start_token_id: what the decoder reads first; by default bos_token_id.
    Raises ValueError as `ClearheadConfig` does; keys of a side are named with it.
    """

    model_type = "clearhead_seq2seq"
    keys_to_ignore_at_inference: ClassVar = ["past_key_values"]
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "encoder": ClearheadEncoderConfig,
        "decoder": ClearheadConfig,
    }

    # Wider than what `_side` lets through, which has a sentence for what it does not.
    encoder: PreTrainedConfig | dict[str, Any] | None = None
    decoder: PreTrainedConfig | dict[str, Any] | None = None
    cross_attention: str | None = None
    cross_attention_options: dict[str, Any] | None = None
    cross_position: str = "nope"
    is_encoder_decoder: bool = True
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    decoder_start_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        flat = {name: kwargs.pop(name) for name in list(kwargs) if name in FLAT}
        tokens = {name: getattr(self, name) for name in _TOKENS if getattr(self, name) is not None}
        made: dict[str, Any] = {}
        for side, config_class in zip(SIDES, (ClearheadEncoderConfig, ClearheadConfig), strict=True):
            made[side] = _side(side, getattr(self, side), config_class, flat, tokens)
        self.encoder, self.decoder = made["encoder"], made["decoder"]
        for name in _TOKENS:
            if getattr(self, name) is None:
                setattr(self, name, getattr(made["decoder"], name))
        if self.decoder_start_token_id is None:
            self.decoder_start_token_id = self.bos_token_id
        super().__post_init__(**kwargs)

    def __getattr__(self, name: str) -> Any:
        # Only what is not found otherwise comes here; a half-made configuration has no sides yet.
        side = self.__dict__.get("decoder") if name in FLAT else None
        if isinstance(side, PreTrainedConfig):
            return getattr(side, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        sides = [self.__dict__.get(side) for side in SIDES] if name in FLAT else []
        if any(isinstance(side, PreTrainedConfig) for side in sides):
            for side in sides:
                setattr(side, name, value)
        else:
            super().__setattr__(name, value)

    def validate_architecture(self) -> None:
        """Part of the strict validation: raises for what no model can be built from."""
        encoder, decoder = self.sides
        for key in ("compact_cache", "twin_heads"):
            if getattr(decoder, key):
                raise ValueError(
                    f"decoder: {key} is for models that a server or a long text asks for; an encoder-decoder has the "
                    "caches of transformers alone"
                )
        if self.tie_word_embeddings:
            for key in ("vocab_size", "hidden_size"):
                here, there = getattr(encoder, key), getattr(decoder, key)
                if here != there:
                    raise ValueError(
                        f"tie_word_embeddings makes one matrix of both embeddings, but {key} is {here} in the encoder "
                        f"and {there} in the decoder"
                    )
        for name in ("pad_token_id", "decoder_start_token_id"):
            token = getattr(self, name)
            if token is not None and not 0 <= token < decoder.vocab_size:
                raise ValueError(f"{name} is {token}; the decoder knows 0 to {decoder.vocab_size - 1}")
        self._check_cross_position()
        self.make_cross_variant(0)

    def _check_cross_position(self) -> None:
        method = resolve("positions", self.cross_position)
        if method.causal_only:
            raise ValueError(
                f"cross_position {self.cross_position!r} is defined for causal attention only: its factor grows "
                "without bound towards later keys, and the source of a short target lies behind it"
            )
        if not method.rotates and self.cross_position != "nope":
            raise ValueError(
                f"cross_position {self.cross_position!r} takes distances within one sequence; a token of the target "
                "and one of the source have none: it must be nope, or a rotary position if asked for (rope)"
            )
        if self.cross_position != "nope" and self.make_cross_position().depends_on_length:
            kind = (self.sides[1].rope_parameters or {}).get("rope_type")
            raise ValueError(
                f"cross_position {self.cross_position!r} with rope_type {kind!r}: the angles would depend on the "
                "length of a target that is not written yet, while the source's keys are turned once; give nope"
            )
        variant = resolve("variants", self.cross_variant[0])
        if variant.needs_rotation and not method.rotates:
            raise ValueError(
                f"cross_attention {self.cross_variant[0]!r} is defined by rotary angles: cross_position must be rope, "
                f"not {self.cross_position!r}"
            )

    @property
    def sides(self) -> tuple[ClearheadEncoderConfig, ClearheadConfig]:
        """The two configurations."""
        assert isinstance(self.encoder, ClearheadEncoderConfig) and isinstance(self.decoder, ClearheadConfig)
        return self.encoder, self.decoder

    @property
    def cross_variant(self) -> tuple[str, dict[str, Any]]:
        """The name of cross-attention's variant, and its options."""
        decoder = self.sides[1]
        name = self.cross_attention
        if name is None:
            name = decoder.attention
            without = resolve("variants", name).without_angles
            if without is not None and not resolve("positions", self.cross_position).rotates:
                name = without
        if self.cross_attention_options is not None:
            return name, dict(self.cross_attention_options)
        if resolve("variants", name) is not resolve("variants", decoder.attention) and self.cross_attention:
            return name, {}
        known = option_names(resolve("variants", name))
        return name, {key: value for key, value in (decoder.attention_options or {}).items() if key in known}

    def make_cross_variant(self, layer_idx: int) -> Variant:
        """The variant of one layer's cross-attention; heads are counted as the decoder's."""
        name, options = self.cross_variant
        try:
            return make_variant(name, self.sides[1].head_shape(layer_idx), options)
        except ValueError as error:
            raise ValueError(f"cross-attention: {error}") from None

    def make_cross_position(self) -> Position:
        """The position method between the two sequences."""
        decoder = self.sides[1]
        assert decoder.head_dim is not None
        parameters = {} if self.cross_position == "nope" else dict(decoder.rope_parameters or {})
        method: type[Position] = resolve("positions", self.cross_position)
        return method.from_parameters(decoder.head_dim, parameters, decoder.max_position_embeddings)


def _side(
    side: str,
    given: Any,
    config_class: type[ClearheadConfig],
    flat: dict[str, Any],
    tokens: dict[str, Any],
) -> ClearheadConfig:
    """The configuration of one side: its own keys before those that were given for both."""
    if isinstance(given, PreTrainedConfig):
        if not isinstance(given, config_class) or (config_class is ClearheadConfig and not given.causal):
            raise ValueError(
                f"{side} must be a {config_class.__name__}, or a table of its keys, not a {type(given).__name__}"
            )
        if flat:
            raise ValueError(
                f"{side} is a whole configuration, so {', '.join(sorted(flat))} cannot be given beside it: give a "
                "table of what differs"
            )
        return given
    own = {name: value for name, value in (given or {}).items() if name != "model_type"}
    try:
        return config_class(**{**flat, **tokens, **own})
    except (ValueError, StrictDataclassError) as error:
        raise ValueError(f"{side}: {error.__cause__ or error}") from None
