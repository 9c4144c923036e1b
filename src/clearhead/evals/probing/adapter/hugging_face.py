"""Any other model: rotary modules that are exchanged, and attention by way of Hugging Face's attention interface."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import AttentionInterface

from clearhead.evals.probing.adapter.base import GROWING, ORIGINAL, ModelAdapter, scaling_over
from clearhead.evals.probing.quantised_attention import quantised_attention
from clearhead.evals.probing.streams import Pairs, Record, Recorded
from clearhead.positions.interchange import INTERLEAVED, to_transformers

RECORDING = "clearhead_recording"
QUANTISED = "clearhead_quantised"
PARTIAL = "partial_rotary_factor"

_listener: ContextVar[tuple[Record, Pairs | None] | None] = ContextVar("clearhead_recorder", default=None)


class HuggingFaceModel(ModelAdapter):
    """A model of the transformers library, or anything that is called like one."""

    def too_long(self, length: int) -> str | None:
        """Positions that are computed (rotary ones) have no end; a table of learned positions has one."""
        config = self.model.config
        if config.to_dict().get("rope_parameters"):
            return None
        limit = getattr(config, "max_position_embeddings", None)
        if limit is not None and length > limit:
            return f"{length} tokens is more than the model takes (max_position_embeddings = {limit})"
        return None

    def keys_depend_on_request(self) -> bool:
        # Inside `rescaled` the frequencies are settled for one length.
        return False

    @contextmanager
    def rescaled(
        self, parameters: Mapping[str, Any] | None, *, trained: int | None, length: int | None
    ) -> Iterator[None]:
        found = self._rotary_modules()
        if not found and parameters is not None:
            raise ValueError(
                f"{type(self.model).__name__} has no rotary position embedding, or not one for all layers, "
                "so no rotary scaling can be tried on it"
            )
        made = [
            (parent, name, _embedding(module, parameters, trained, length)) for parent, name, module in found
        ]
        try:
            for parent, name, module in made:
                setattr(parent, name, module)
            yield
        finally:
            for parent, name, module in found:
                setattr(parent, name, module)

    @contextmanager
    def recorded(self, record: Record) -> Iterator[None]:
        with self._attention(
            RECORDING, _recording_attention, sdpa_mask, "queries and keys cannot be looked at"
        ):
            token = _listener.set((record, self._pairs()))
            try:
                yield
            finally:
                _listener.reset(token)

    @contextmanager
    def rounded_attention(self) -> Iterator[None]:
        with self._attention(QUANTISED, quantised_attention, eager_mask, "logits cannot be quantised"):
            yield

    @contextmanager
    def _attention(
        self, name: str, function: Callable[..., Any], mask: Any, otherwise: str
    ) -> Iterator[None]:
        """Inside, all attention goes through `function`; ValueError for a model that has it not in its hands."""
        AttentionInterface.register(name, function)
        # Without a mask function of the same name padding would be lost without a word.
        AttentionMaskInterface.register(name, mask)
        before = str(self.model.config._attn_implementation)
        self.model.set_attn_implementation(name)
        if self.model.config._attn_implementation != name:
            raise ValueError(
                f"the attention of {type(self.model).__name__} does not go through Hugging Face's attention interface, "
                f"so its {otherwise}"
            )
        try:
            yield
        finally:
            self.model.set_attn_implementation(before)

    def _rotary_modules(self) -> list[tuple[nn.Module, str, Any]]:
        """(parent, name, module) of every rotary embedding, known by its frequencies."""
        return [
            (parent, name, child)
            for parent in self.model.modules()
            for name, child in parent.named_children()
            if "inv_freq" in dict(child.named_buffers(recurse=False))
        ]

    def _pairs(self) -> Pairs | None:
        """How the rotary embedding pairs components, the turned ones being the first."""
        modules = self._rotary_modules()
        if not modules:
            return None
        width = 2 * int(modules[0][2].inv_freq.numel())
        interleaved = self.model.config.get_text_config().model_type in INTERLEAVED

        def pairs(x: Tensor) -> tuple[Tensor, Tensor]:
            turned = x[..., :width]
            if interleaved:
                return turned[..., 0::2], turned[..., 1::2]
            first, second = turned.chunk(2, dim=-1)
            return first, second

        return pairs


def _embedding(
    module: Any, parameters: Mapping[str, Any] | None, trained: int | None, length: int | None
) -> nn.Module:
    """The rotary embedding itself if there is nothing to do, else one of its kind, its length settled."""
    own = dict(module.config.rope_parameters)
    if parameters is None and (length is None or own.get("rope_type") not in GROWING):
        return module  # type: ignore[no-any-return]
    config = copy.deepcopy(module.config)
    if parameters is not None:
        wanted = scaling_over(own, parameters, trained or config.max_position_embeddings)
        # transformers' dynamic scaling counts from max_position_embeddings and from nothing else.
        config.max_position_embeddings = wanted.get(ORIGINAL, config.max_position_embeddings)
        width = 2 * module.inv_freq.numel()
        config.rope_parameters = to_transformers(wanted, width, config.max_position_embeddings)
        if PARTIAL in own:
            config.rope_parameters[PARTIAL] = own[PARTIAL]
    made: Any = type(module)(config).to(module.inv_freq.device)
    kind = config.rope_parameters["rope_type"]
    if kind in GROWING and length is not None:
        made.inv_freq, made.attention_scaling = ROPE_INIT_FUNCTIONS[kind](
            config, module.inv_freq.device, seq_len=length
        )
        # Under this name it leaves its frequencies alone.
        made.rope_type = "default"
    return made  # type: ignore[no-any-return]


def _recording_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """SDPA, after the streams were handed on. `options` are Hugging Face's."""
    heard = _listener.get()
    if heard is not None:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        record, pairs = heard
        record(Recorded(int(module.layer_idx), (query,), (key,), scale, pairs=pairs))  # type: ignore[arg-type]
    return sdpa_attention_forward(  # type: ignore[no-any-return]
        module, query, key, value, attention_mask, scaling=scaling, **options
    )
