"""The configuration of a clearhead model."""

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from clearhead.core.lowering import one_call
from clearhead.core.sparse import BlockSparse
from clearhead.core.streams import HeadShape, Widths
from clearhead.models import plans
from clearhead.models.kinds import (
    TWIN_KEYS,
    LayerKind,
    check_layers,
    check_twin_heads,
    check_window,
    make_kinds,
)
from clearhead.models.saved_config import AUTOMATIC, SavedConfig
from clearhead.positions.base import Position
from clearhead.registry import resolve
from clearhead.variants.base import Variant, make_variant

__all__ = ["AUTOMATIC", "ClearheadConfig"]


@strict
class ClearheadConfig(SavedConfig):
    """Sizes and choices of a decoder as LLaMA's (pre-RMSNorm, SwiGLU, no biases) with any attention and position.

    num_attention_heads, num_key_value_heads and head_dim count as for the Transformer twin, whatever the variant
    makes of them: two configurations that differ in `attention` alone are twins.

    attention:          a registered variant: softmax, differential, differential_v2, collinear,
        differential_collinear, differential_v2_collinear, dex, diff_lora.
    attention_options:  its keyword arguments, for example {"mode": "slack"} for collinear.
    position:           a registered position: rope, xpos, alibi, nope.
    rope_parameters:    {"rope_type": "default", "rope_theta": 10000.0} as in transformers, or a scaling: rope_type
        linear, ntk, dynamic, yarn, llama3 or longrope with its keys; and "layout", "half" or "interleaved".
    max_position_embeddings: the length trained with, which scalings count from unless
        original_max_position_embeddings in `rope_parameters` says otherwise. It bounds nothing.
    layer_positions:    a position for each layer, in place of one `position` for all.
    nope_interval:      n ≥ 2: every n-th layer, n−1, 2n−1, ... counted from 0, has "nope" in place of `position`, as
        SmolLM3's no_rope_layer_interval does.
    sliding_window:     a query sees the last so many keys, its own among them, in every layer; by default all. Caches
        of such layers do not grow past it.
    layers:             what differs from layer to layer: a list of tables with the keys attention, attention_options,
        position and sliding_window, repeated over the depth. What a table does not say is as above. [{"sliding_window":
        512}] * 3 + [{}] gives every fourth layer all keys and the others a window; a list of num_hidden_layers tables
        says each layer for itself.
    intermediate_size:  by default 8/3 · hidden_size rounded up to a multiple of 64.
    initializer_range:  standard deviation of all matrices at the start; embedding_initializer_range: of the token
        embedding, by default the same. A small model learns to look things up far sooner when its (untied) embedding
        starts large beside what the layers add to it.
    compact_cache:      caches of collinear variants hold half of every key, a quarter less in all; positions behind a
        cache are then always counted from the mask.
    block_sparse:       blocks of keys may be left out where a long prompt is read: {"left_out": 0.01} lets a query lose
        a hundredth of its softmax; "estimate" and "least" as in `clearhead.functional.BlockSparse`. By default nothing
        is left out. On CPUs only, without gradients and maps; it may be set at any time.
    num_key_value_heads, head_dim: by default num_attention_heads and hidden_size / num_attention_heads.
    twin_heads:         in what `clearhead convert --to serving` writes, the twin's num_attention_heads and
        num_key_value_heads. The keys of these names are then those of the one call a layer that a server's attention
        function gets, because that is what servers read there. Elsewhere None.
    Raises ValueError for an unknown name or option and for sizes that do not fit, naming the key.
    """

    model_type = "clearhead"
    keys_to_ignore_at_inference: ClassVar = ["past_key_values"]
    # Whether a token sees no later one.
    causal: ClassVar[bool] = True

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
    sliding_window: int | None = None
    layers: list[dict[str, Any]] | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    embedding_initializer_range: float | None = None
    tie_word_embeddings: bool = False
    use_cache: bool = True
    compact_cache: bool = False
    block_sparse: dict[str, Any] | None = None
    twin_heads: dict[str, int] | None = None
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

    def validate_rope(self) -> None:
        """Part of the strict validation that `make_positions` does here: it knows more keys and is stricter."""

    def validate_architecture(self) -> None:
        """Part of the strict validation: raises for what no model can be built from."""
        for name in ("vocab_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if not self.rms_norm_eps > 0:
            raise ValueError(f"rms_norm_eps must be positive, not {self.rms_norm_eps}")
        check_window(self.sliding_window, "sliding_window")
        self._check_layer_positions()
        check_twin_heads(self.twin_heads)
        BlockSparse.of(self.block_sparse)
        kinds = self.layer_kinds
        for layer in (kinds.index(kind) for kind in dict.fromkeys(kinds)):
            try:
                variant = self.make_variant(layer)
            except ValueError as error:
                where = "" if self.layers is None else f"layer {layer}: "
                raise ValueError(where + _in_our_terms(str(error))) from None
            if self.compact_cache and variant.placement is None:
                raise ValueError(
                    f"compact_cache is for collinear variants, whose keys are half redundant: "
                    f"attention is {kinds[layer].attention!r}"
                )
        self._check_rotation()
        self._check_call()
        self.make_positions()

    def _check_call(self) -> None:
        """With `twin_heads` the head counts must be those of the call that the layers make."""
        if self.twin_heads is None:
            return
        named = (self.num_attention_heads, self.num_key_value_heads)
        for kind in dict.fromkeys(self.layer_kinds):
            call = one_call(self.widths(kind))
            made = call if isinstance(call, str) else (call.query_heads, call.kv_heads)
            if made != named:
                raise ValueError(
                    f"twin_heads {self.twin_heads} does not go with num_attention_heads and num_key_value_heads "
                    f"{named}: attention {kind.attention!r} makes {made} of it"
                )

    def _check_layer_positions(self) -> None:
        if self.layers is not None:
            check_layers(self.layers, self.num_hidden_layers)
            if any("position" in entry for entry in self.layers):
                for key in ("layer_positions", "nope_interval"):
                    if getattr(self, key) is not None:
                        raise ValueError(f"give positions in layers or {key}, not both")
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
        for layer, kind in enumerate(self.layer_kinds):
            if not resolve("variants", kind.attention).needs_rotation:
                continue
            if resolve("positions", kind.position).rotates:
                continue
            key = "position"
            if self.layers is not None:
                key = f"layers (layer {layer})"
            elif self.layer_positions is not None:
                key = f"layer_positions[{layer}]"
            elif self.nope_interval is not None:
                key = f"nope_interval ({self.nope_interval})"
            raise ValueError(
                f"attention {kind.attention!r} is defined by rotary angles: {key} must give every layer a rotary "
                f"position, not {kind.position!r}"
            )

    @property
    def per_layer_config(self) -> Sequence[PreTrainedConfig]:
        """A configuration for each layer, whose num_key_value_heads and head_dim are what the layer's cache holds.

        Hugging Face's tools that make a cache before the first call read them here (static caches for export, chunked
        prefill). V1 holds half of the twin's heads, twice as wide. Where keys and values differ in width (compact
        caches) they are qk_head_dim and v_head_dim, as for models with latent attention.
        """
        kinds = self.layer_kinds
        made = {kind: self._of_cache(kind) for kind in dict.fromkeys(kinds)}
        return [made[kind] for kind in kinds]

    @per_layer_config.setter
    def per_layer_config(self, value: dict[int | str, dict[str, Any]] | None) -> None:
        if value is not None:
            raise ValueError(
                "give layers, which may differ in attention, position and sliding_window, not per_layer_config"
            )

    def _of_cache(self, kind: LayerKind) -> PreTrainedConfig:
        sizes = self.widths(kind)
        keys = sizes.key_streams * sizes.key_width // (2 if self.compact_cache else 1)
        held: dict[str, Any] = {}
        if (sizes.kv_heads, keys, sizes.value_width) != (self.num_key_value_heads, *[self.head_dim] * 2):
            held = {"num_key_value_heads": sizes.kv_heads, "head_dim": keys}
            if keys != sizes.value_width:
                held |= {"qk_head_dim": keys, "v_head_dim": sizes.value_width}
        if kind.window != self.sliding_window:
            held["sliding_window"] = kind.window
        if not held:
            return self
        made = copy.copy(self)
        # Past the validation: this describes a cache, not a model.
        made.__dict__.update(held)
        return made

    # What transformers reads to distribute a model; see `plans`.
    base_model_pp_plan: ClassVar[Any] = plans.PIPELINE

    @property
    def base_model_tp_plan(self) -> dict[str, str] | None:  # type: ignore[override]
        """How tensor parallelism shares out each part of the decoder; None where a variant does not say how."""
        return plans.tensor_parallel(self._kinds_of_variants())

    @property
    def base_model_fsdp_plan(self) -> dict[str, str]:  # type: ignore[override]
        """What FSDP gathers at once."""
        return plans.fully_sharded(self._kinds_of_variants())

    def _kinds_of_variants(self) -> list[Variant]:
        kinds = self.layer_kinds
        with torch.device("meta"):
            return [self.make_variant(kinds.index(kind)) for kind in dict.fromkeys(kinds)]

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """What each layer is."""
        own = self._own_positions()
        return make_kinds(self.layers, self.attention, self.attention_options or {}, own, self.sliding_window)

    @property
    def positions_by_layer(self) -> tuple[str, ...]:
        """The name of each layer's position."""
        return tuple(kind.position for kind in self.layer_kinds)

    def _own_positions(self) -> tuple[str, ...]:
        """Those of layers that `layers` says nothing of."""
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
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if self.twin_heads is not None:
            heads, groups = (self.twin_heads[key] for key in TWIN_KEYS)
        return HeadShape(self.hidden_size, heads, groups, self.head_dim, layer_idx)

    def widths(self, kind: LayerKind) -> Widths:
        """What a layer of this kind is made of."""
        with torch.device("meta"):
            return make_variant(kind.attention, self.head_shape(0), kind.options).sizes

    def make_variant(self, layer_idx: int) -> Variant:
        """The variant of one layer; ValueError if the options are not its own."""
        kind = self.layer_kinds[layer_idx]
        return make_variant(kind.attention, self.head_shape(layer_idx), kind.options)

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
            made[name] = method.from_parameters(
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
