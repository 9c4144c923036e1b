"""The decoder and its language-modelling head.

Legend: B batch, H output heads, L queries, S keys, V vocabulary.
"""

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel, slice_logits_to_keep
from transformers.utils.generic import can_return_tuple
from transformers.utils.loading_report import LoadStateDictInfo

from clearhead.core.dispatch import Backend, Problem, automatic_backends, load_backend
from clearhead.core.masks import MaskSpec
from clearhead.core.norm import RMSNorm
from clearhead.models.arguments import check_keywords, packed_numbers
from clearhead.models.config import AUTOMATIC, ClearheadConfig
from clearhead.models.diagnostics import diagnostics_of
from clearhead.models.generation import ClearheadGeneration
from clearhead.models.inputs import (
    Placed,
    key_positions,
    place,
    request_lengths,
    shortest_trained_length,
)
from clearhead.models.layers import ClearheadDecoderLayer
from clearhead.models.shared import Plans, Shared
from clearhead.positions.base import Position, Rotation
from clearhead.positions.length import warn_of_unknown_lengths
from clearhead.registry import names
from clearhead.variants.base import Variant

# Hugging Face's names for what this library runs itself.
_OWN_ENGINES = {"eager": "eager", "sdpa": "sdpa", "flex_attention": "flex"}


# Loaded here, so that a first call inside `torch.compile` has nothing left to import.
automatic_backends()


def backends_for(attn_implementation: str) -> tuple[Backend, ...]:
    """The backends behind a Hugging Face `attn_implementation`: one, or for "clearhead" all to choose from."""
    if attn_implementation == AUTOMATIC:
        return automatic_backends()
    return (load_backend(_OWN_ENGINES.get(attn_implementation, attn_implementation)),)


class ClearheadPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation."""

    config_class = ClearheadConfig
    config: ClearheadConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ClearheadDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def get_correct_attn_implementation(
        self, requested_attention: str | None, is_init_check: bool = False
    ) -> str:
        """Takes "clearhead" (the default) and every engine and kernel by its name, besides what Hugging Face knows."""
        if requested_attention is None:
            return AUTOMATIC
        if requested_attention in (AUTOMATIC, *names("kernels"), *names("engines")):
            return str(requested_attention)
        return str(super().get_correct_attn_implementation(requested_attention, is_init_check))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Variant):
            module.reset_parameters()
        elif isinstance(module, nn.Embedding) and self.config.embedding_initializer_range is not None:
            init.normal_(module.weight, std=self.config.embedding_initializer_range)
            if module.padding_idx is not None and not getattr(module.weight, "_is_hf_initialized", False):
                init.zeros_(module.weight[module.padding_idx])
        elif isinstance(module, Position):
            module.reset_buffers()

    def _adjust_missing_and_unexpected_keys(self, loading_info: LoadStateDictInfo) -> None:
        # Hugging Face would start missing weights at random and drop the others with a warning. A missing head is
        # what fine-tuning is for; layers that do not match are the checkpoint of another model.
        super()._adjust_missing_and_unexpected_keys(loading_info)
        for problem, keys in (
            ("has no", loading_info.missing_keys),
            ("has an unknown", loading_info.unexpected_keys),
        ):
            layers = sorted(key for key in keys if "layers." in key)
            if layers:
                raise ValueError(
                    f"the checkpoint does not fit attention {self.config.attention!r} with "
                    f"{self.config.attention_options}: it {problem} {layers[0]} ({len(layers)} such)"
                )


class ClearheadModel(ClearheadPreTrainedModel):
    """Token embedding, decoder layers and a final norm."""

    def __init__(self, config: ClearheadConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(ClearheadDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        # One instance for each distinct method; `layer_positions` says which layer has which.
        self.positions = nn.ModuleDict(config.make_positions())
        self.layer_positions = config.positions_by_layer
        self.gradient_checkpointing = False
        declared = {n for layer in self._decoder_layers() for n in layer.self_attn.variant.float32_parameters}
        self._keep_in_fp32_modules_strict = [f"self_attn.variant.{name}" for name in sorted(declared)]
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        rope_length: int | Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Token ids (B, L) to hidden states (B, L, hidden_size).

        attention_mask: (B, S) with 1 for real tokens and 0 for padding, or (B, 1 or H, L, S) bool or additive, which
            then says everything.
        position_ids:   integers (B or 1, L). Without them they count real tokens. In a call that extends no cache,
            positions that restart among real tokens mean packed documents that cannot see each other. Without a mask
            one that does not follow its neighbour is a restart, as in transformers; beside one only one that goes back.
        rope_length:    the length of the whole request in tokens, or (B,) of each row's, for rope scalings that depend
            on it; others do not look at it. By default the longest position + 1 of the row, or of each packed document:
            no neighbour changes a row. Calls that extend a cache past the trained length must all be given the same
            one (`generate` does); one that is missing, or shorter than the request, is an error. A cache of fixed size
            counts as full, because asking how full it is would stall its device.
        output_attentions: effective maps (B, H, L, S) a layer, A1 − λ A2 for the differential variants, from the
            engine that has maps: chosen by itself under "clearhead", to be named otherwise ("eager"). What follows is
            computed from them, so they have gradients.
        kwargs: what transformers' tools hand to any model. cu_seq_lens_q and seq_idx mean packed documents too; another
            name that transformers' models do not have either is a TypeError.
        """
        check_keywords(kwargs, _ARGUMENTS)
        if torch.jit.is_tracing():  # type: ignore[attr-defined]
            raise ValueError(
                "torch.jit.trace keeps what it sees of its example (nothing is padded, say) for every input after it; "
                "export with torch.export"
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if inputs_embeds.shape[1] == 0:
            raise ValueError("the input has no tokens")
        use_cache = self.config.use_cache if use_cache is None else use_cache
        use_cache = use_cache and not (self.gradient_checkpointing and self.training)
        output_attentions = bool(
            self.config.output_attentions if output_attentions is None else output_attentions
        )
        output_hidden_states = bool(
            self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        )

        if past_key_values is not None:
            self._check_cache(past_key_values)
        elif use_cache:
            past_key_values = DynamicCache(config=self.config)
        methods, batch = self.position_methods(), inputs_embeds.shape[0]
        slopes = self._slopes()
        placed = place(
            inputs_embeds,
            attention_mask,
            position_ids,
            past_key_values,
            packed_numbers(kwargs, batch, inputs_embeds.shape[1]),
            distances=any(found is not None for found in slopes.values()),
        )
        length = request_lengths(methods.values(), rope_length, placed, batch, past_key_values)
        told = attention_mask is not None or position_ids is not None or rope_length is not None
        if length is not None and not told and not self.training:
            warn_of_unknown_lengths(shortest_trained_length(methods.values()), batch, placed.keys)
        compact = self.config.compact_cache and past_key_values is not None
        keys = key_positions(placed) if compact else None
        plans = self._plan_each(inputs_embeds, placed, slopes, output_attentions)
        shared = {}
        for name, method in methods.items():
            rotation = method(placed.positions, keys, length, inputs_embeds.dtype)
            table = self._table(rotation, inputs_embeds) if compact else None
            shared[name] = Shared(inputs_embeds.device, rotation, plans[name], table)

        hidden_states = inputs_embeds
        states: tuple[Tensor, ...] = ()
        maps: tuple[Tensor, ...] = ()
        for layer, position in zip(self.layers, self.layer_positions, strict=True):
            if output_hidden_states:
                states = (*states, hidden_states)
            hidden_states, layer_map = layer(
                hidden_states,
                shared[position],
                past_key_values=past_key_values,
                output_attentions=output_attentions,
            )
            if layer_map is not None:
                maps = (*maps, layer_map)
        hidden_states = self.norm(hidden_states)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values,
            hidden_states=(*states, hidden_states) if output_hidden_states else None,
            attentions=maps if output_attentions else None,
        )

    def _table(self, rotation: Rotation, inputs_embeds: Tensor) -> Tensor:
        """What turns held keys into keys; in float64 for float64 models."""
        placement = self._variant().placement
        assert placement is not None
        wide = torch.promote_types(torch.float32, inputs_embeds.dtype)
        return placement.table(rotation, inputs_embeds.device, wide)

    def position_methods(self) -> dict[str, Position]:
        """The position methods in use, by name."""
        return {name: cast(Position, method) for name, method in self.positions.items()}

    def _slopes(self) -> dict[str, Tensor | None]:
        """Those of each position method."""
        heads = self._variant().sizes.heads
        return {name: method.slopes(heads) for name, method in self.position_methods().items()}

    def _plan_each(
        self,
        inputs_embeds: Tensor,
        placed: Placed,
        slopes: Mapping[str, Tensor | None],
        output_attentions: bool,
    ) -> dict[str, Plans]:
        """A plan and a mask for each position method; those without slopes share theirs."""
        plain: Plans | None = None
        found = {}
        for name, own in slopes.items():
            if own is not None:
                mask = replace(placed.mask, slopes=own, offset=placed.past, places=placed.places)
                found[name] = self._plan(inputs_embeds, mask, placed.keys, output_attentions)
                continue
            if plain is None:
                plain = self._plan(inputs_embeds, placed.mask, placed.keys, output_attentions)
            found[name] = plain
        return found

    def _plan(self, inputs_embeds: Tensor, mask: MaskSpec, keys: int, output_attentions: bool) -> Plans:
        variant = self._variant()
        problem = Problem.of_widths(
            variant.sizes,
            queries=inputs_embeds.shape[1],
            keys=keys,
            mask=mask,
            mixing=variant.mixing,
            dtype=self._compute_dtype(inputs_embeds),
            device=inputs_embeds.device,
            needs_grad=torch.is_grad_enabled()
            and (inputs_embeds.requires_grad or any(p.requires_grad for p in self.parameters())),
            needs_maps=output_attentions,
        )
        implementation = self.config._attn_implementation or AUTOMATIC
        return Plans.make(problem, mask, backends_for(implementation), implementation == AUTOMATIC)

    def _check_cache(self, cache: Cache) -> None:
        """ValueError for keys and values that no layer here has written."""
        layers = getattr(cache, "layers", None)
        held = getattr(layers[0], "keys", None) if layers else None
        if not isinstance(held, Tensor) or held.ndim != 4:
            return
        sizes = self._variant().sizes
        width = sizes.key_streams * sizes.key_width // (2 if self.config.compact_cache else 1)
        if (held.shape[1], held.shape[3]) != (sizes.kv_heads, width):
            compact = " with compact_cache" if self.config.compact_cache else ""
            raise ValueError(
                f"past_key_values hold keys of {held.shape[1]} heads, {held.shape[3]} wide; attention "
                f"{self.config.attention!r}{compact} has {sizes.kv_heads} heads, {width} wide. PEFT's prefix tuning "
                "makes keys for the Transformer twin and cannot be used here; prompt tuning and LoRA can"
            )

    def _variant(self) -> Variant:
        """The first layer's, for what all layers have alike."""
        return self._decoder_layers()[0].self_attn.variant

    def _decoder_layers(self) -> list[ClearheadDecoderLayer]:
        return [layer for layer in self.layers if isinstance(layer, ClearheadDecoderLayer)]

    def _compute_dtype(self, inputs_embeds: Tensor) -> torch.dtype:
        device = inputs_embeds.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return inputs_embeds.dtype


_ARGUMENTS = inspect.signature(ClearheadModel.forward).parameters


# Hugging Face looks for its mixin among the direct bases.
class ClearheadForCausalLM(ClearheadPreTrainedModel, ClearheadGeneration, GenerationMixin):
    """A causal language model with any attention variant; used like LLaMA's."""

    # The loss divides by `num_items_in_batch`, so Trainer's gradient accumulation and averaging over devices are exact.
    accepts_loss_kwargs = True
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: ClearheadConfig) -> None:
        super().__init__(config)
        self.model = ClearheadModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def position_methods(self) -> dict[str, Position]:
        return self.model.position_methods()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        shift_labels: Tensor | None = None,
        rope_length: int | Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Token ids (B, L) to logits (B, L, V), and the loss in nats a token if labels (B, L) are given.

        labels are not shifted, shift_labels are and go before them; −100 is ignored. `num_items_in_batch` divides the
        summed loss instead of the number of labels here, for gradient accumulation. The rest as for
        `ClearheadModel.forward`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            rope_length=rope_length,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None or shift_labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                shift_labels=shift_labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def lambdas(self, input_ids: Tensor | None = None) -> dict[int, float]:
        """Mean λ of each differential layer: for V2 over heads and tokens of `input_ids` (B, L).

        Layers without λ, and V2 layers when no tokens are given, are left out.
        """
        return self.diagnostics(input_ids).get("lambda", {})

    def diagnostics(self, input_ids: Tensor | None = None) -> dict[str, dict[int, float]]:
        """What the layers' variants have for a log (`Variant.diagnostics`), by name, then by layer.

        What depends on the input is of the tokens `input_ids` (B, L), and left out without them.
        """

        def states() -> tuple[Tensor, ...]:
            outputs = self.model(input_ids=input_ids, use_cache=False, output_hidden_states=True)
            return cast(tuple[Tensor, ...], outputs.hidden_states)

        return diagnostics_of(self.model._decoder_layers(), None if input_ids is None else states)
