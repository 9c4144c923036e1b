"""Models of this library: rotary lengths told by each call, streams seen by way of the variant, engines of its own."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from clearhead.core.streams import Streams
from clearhead.evals.probing.adapter.base import ModelAdapter, scaling_over
from clearhead.evals.probing.quantised_attention import OWN
from clearhead.evals.probing.streams import Record, Recorded
from clearhead.positions.base import Position, Rotation
from clearhead.variants.base import Variant


class OwnModel(ModelAdapter):
    """`model` is one of the library's families."""

    def too_long(self, length: int) -> str | None:
        # Positions are computed, so they have no end.
        return None

    def keys_depend_on_request(self) -> bool:
        methods: Mapping[str, Any] = self.model.base_model.position_methods()
        return any(method.depends_on_length for method in methods.values())

    @contextmanager
    def rescaled(
        self, parameters: Mapping[str, Any] | None, *, trained: int | None, length: int | None
    ) -> Iterator[None]:
        if parameters is None:
            yield
            return
        model, decoder, config = self.model, self.model.base_model, copy.deepcopy(self.model.config)
        before = decoder.positions
        if not any(method.rotates for method in decoder.position_methods().values()):
            names = ", ".join(before)
            raise ValueError(
                f"the model has no rotary positions but {names!r}, so no rotary scaling can be tried on it"
            )
        config.rope_parameters = scaling_over(config.rope_parameters or {}, parameters, trained)
        decoder.positions = nn.ModuleDict(config.make_positions()).to(model.device, model.dtype)
        try:
            yield
        finally:
            decoder.positions = before

    @contextmanager
    def recorded(self, record: Record) -> Iterator[None]:
        """The variant's `place` sees the streams before and after."""
        decoder = self.model.base_model
        with ExitStack() as stack:
            for index, layer in enumerate(decoder.layers):
                kind = decoder.kinds[index]
                position = decoder.position_methods()[kind.position]
                stack.enter_context(_listening(layer.self_attn, index, position, kind.window, record))
            yield

    @contextmanager
    def rounded_attention(self) -> Iterator[None]:
        before = str(self.model.config._attn_implementation)
        self.model.config._attn_implementation = OWN
        try:
            yield
        finally:
            self.model.config._attn_implementation = before


@contextmanager
def _listening(
    attention: Any, index: int, position: Position, window: int | None, record: Record
) -> Iterator[None]:
    variant: Any = attention.variant
    plain = variant.place

    def place(heads: Streams, rotation: Rotation) -> Streams:
        placed = plain(heads, rotation)
        keys = placed.k * (len(placed.q) // len(placed.k))
        record(
            Recorded(
                index,
                placed.q,
                keys,
                attention.scale,
                position.slopes(variant.sizes.heads),
                rotation.pairs if position.rotates else None,
                heads.closed(),
                variant.placement,
                window,
                rotation.query if position.rotates else None,
            )
        )
        return placed  # type: ignore[no-any-return]

    assert isinstance(variant, Variant)
    variant.place = place  # type: ignore[method-assign]
    try:
        yield
    finally:
        del variant.place
