"""What `generate` has to know of these models: their masks and positions, and how long a request will become.

Legend: B batch, S keys.
"""

from abc import ABC, abstractmethod
from functools import wraps
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.generation.configuration_utils import GenerationConfig, GenerationMode
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.utils import GenerationMixin

from clearhead.models.config import AUTOMATIC
from clearhead.models.forward_inputs import depends_on_length, shortest_trained_length
from clearhead.models.growing_cache import grown
from clearhead.positions.base import Position
from clearhead.positions.length import check_cached_length, check_given_length, given_length


class ClearheadGeneration(GenerationMixin, ABC):
    """Hooks of Hugging Face's `generate`, which itself is not overridden."""

    # What a forward pass calls the length of a request.
    rope_length_name: ClassVar[str] = "rope_length"

    @abstractmethod
    def position_methods(self) -> dict[str, Position]:
        """The position methods in use, by name."""

    @staticmethod
    def create_masks_for_generate(
        attention_mask: Tensor | None, past_key_values: Cache | None = None, **unused: Any
    ) -> Tensor | None:
        """Keep the 2-D mask, which the model turns into its engine's form, as wide as a cache of fixed size.

        One shape for all steps of a request, so one compiled graph.
        """
        if (
            attention_mask is None
            or past_key_values is None
            or not getattr(past_key_values, "is_compileable", False)
        ):
            return attention_mask
        # Layers with a window hold the fewest keys; what one holds begins behind what it dropped.
        keys = max(sum(past_key_values.get_mask_sizes(1, i)) for i in range(len(past_key_values.layers)))
        missing = keys - attention_mask.shape[1]
        return F.pad(attention_mask, (0, missing)) if missing > 0 else attention_mask

    # Hugging Face looks at its arguments for what a model takes.
    @wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """As Hugging Face's, which also hands the tokenizers on that stop strings need and no forward pass does."""
        for name in ("tokenizer", "assistant_tokenizer"):
            kwargs.pop(name, None)
        return super().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]
    ) -> Tensor:
        """Counts real tokens as the model does.

        transformers has 0 at padded places: what is generated behind padding on the right would start at 1 again.
        """
        positions: Tensor = super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)  # type: ignore[misc]
        mask = model_kwargs.get("attention_mask")
        return positions if mask is None else (mask.long().cumsum(-1) - 1).clamp(min=0)

    @abstractmethod
    def reason_against_serving(self) -> str | None:
        """Why continuous batching cannot run this model, in one sentence; None where it can."""

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> ContinuousBatchingManager:
        """As Hugging Face's; a model that chooses its backend by itself ("clearhead") has "sdpa" meanwhile.

        ValueError, not empty completions, for a model that it cannot run.
        """
        if reason := self.reason_against_serving():
            raise ValueError(f"generate_batch (continuous batching): {reason}")
        before: str | None = self.config._attn_implementation  # type: ignore[attr-defined]
        if before == AUTOMATIC:
            self.set_attn_implementation("sdpa")  # type: ignore[attr-defined]
        try:
            manager = super().init_continuous_batching(*args, **kwargs)
        except BaseException:
            self.set_attn_implementation(before)  # type: ignore[attr-defined]
            raise
        if before == AUTOMATIC:
            # What the manager goes back to when it stops.
            manager._original_attn_impl = before  # type: ignore[assignment]
        return manager

    def _prepare_generated_length(
        self,
        generation_config: GenerationConfig,
        has_default_max_length: bool,
        has_default_min_length: bool,
        model_input_name: str,
        input_ids_length: int,
        inputs_tensor: Tensor,
    ) -> GenerationConfig:
        prepared: GenerationConfig = super()._prepare_generated_length(  # type: ignore[misc]
            generation_config,
            has_default_max_length,
            has_default_min_length,
            model_input_name,
            input_ids_length,
            inputs_tensor,
        )
        # Noted for the next step: only here is it known what of `max_length` is new, whatever the input was.
        prepared._max_new_tokens = prepared.max_length - input_ids_length  # type: ignore[attr-defined]
        return prepared

    def _prepare_cache_for_generation(  # type: ignore[override]
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Makes a cache that grows in place where none is asked for, and freezes the length of each row's request, real
        prompt tokens and all that may be generated, for rope scalings that depend on it. Called once a request, after
        beams are expanded and positions are counted."""
        cache = model_kwargs.get("past_key_values")
        filled = 0 if cache is None else int(cache.get_seq_length())
        super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        if (
            cache is None
            and generation_config.cache_implementation is None
            and not generation_config.is_assistant
        ):
            _grow_in_place(model_kwargs)
        methods = self.position_methods().values()
        if not depends_on_length(methods):
            return
        new: int = generation_config._max_new_tokens  # type: ignore[attr-defined]
        lengths = self._tokens_so_far(generation_config, model_kwargs) + new
        given = model_kwargs.get(self.rope_length_name)
        if given is not None:
            check_given_length(given_length(given, len(lengths), lengths.device), lengths[:, None])
            return
        check_cached_length(shortest_trained_length(methods), filled, int(lengths.max()))
        model_kwargs[self.rope_length_name] = lengths

    def _tokens_so_far(self, generation_config: GenerationConfig, model_kwargs: dict[str, Any]) -> Tensor:
        """(B,): real tokens of each row before the first new one."""
        positions: Tensor = model_kwargs["position_ids"]
        return positions.amax(dim=1) + 1


def _grow_in_place(model_kwargs: dict[str, Any]) -> None:
    """Replace the layers of an empty cache that `generate` has just made."""
    made = model_kwargs.get("past_key_values")
    own = made.self_attention_cache if isinstance(made, EncoderDecoderCache) else made
    if type(own) is DynamicCache:
        own.layers = grown(own.layers)
