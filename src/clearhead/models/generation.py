"""What `generate` has to know of these models: their masks, and how long a request will become.

Legend: B batch, S keys.
"""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor
from transformers.generation.configuration_utils import GenerationConfig, GenerationMode
from transformers.generation.utils import GenerationMixin

from clearhead.models.inputs import depends_on_length, shortest_trained_length
from clearhead.positions.base import Position
from clearhead.positions.length import check_cached_length


class ClearheadGeneration(GenerationMixin, ABC):
    """Hooks of Hugging Face's `generate`, which itself is not overridden."""

    @abstractmethod
    def position_methods(self) -> dict[str, Position]:
        """The position methods in use, by name."""

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None, **unused: Any) -> Tensor | None:
        """Keep the 2-D mask: the model turns it into its engine's form, for caches of fixed size too."""
        return attention_mask

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
        """Freezes the length of each row's request, real prompt tokens and all that may be generated, for rope scalings
        that depend on it. Called once a request, after beams are expanded and positions are counted."""
        cache = model_kwargs.get("past_key_values")
        super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        methods = self.position_methods().values()
        if model_kwargs.get("rope_length") is not None or not depends_on_length(methods):
            return
        new: int = generation_config._max_new_tokens  # type: ignore[attr-defined]
        lengths = model_kwargs["position_ids"].amax(dim=1) + 1 + new
        if cache is not None:
            check_cached_length(
                shortest_trained_length(methods), int(cache.get_seq_length()), int(lengths.max())
            )
        model_kwargs["rope_length"] = lengths
