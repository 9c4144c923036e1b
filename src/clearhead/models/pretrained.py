"""What all models of the family share: loading, saving, initialisation, and the backends behind a name."""

import os
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.distributed.utils import TransformersDeviceMesh
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.loading_report import LoadStateDictInfo

from clearhead.core.dispatch import Backend, automatic_backends, load_backend
from clearhead.models import plans
from clearhead.models.autoload import is_own
from clearhead.models.config import AUTOMATIC, ClearheadConfig
from clearhead.positions.base import Position
from clearhead.registry import names
from clearhead.runs.card_file import put_card, read_card
from clearhead.variants.base import Variant

# Hugging Face's names for what this library runs itself.
_OWN_ENGINES = {"eager": "eager", "sdpa": "sdpa", "flex_attention": "flex"}


# Whether the caller of `from_pretrained` is handed the names of what is missing and unexpected.
_TELLS: ContextVar[bool] = ContextVar("tells", default=False)

# The card that a directory had before its model was saved into it again.
_CARD: ContextVar[str | None] = ContextVar("card", default=None)

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
    _no_split_modules = ["ClearheadDecoderLayer", "ClearheadEncoderLayer"]  # noqa: RUF012
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

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "AutoModel") -> None:
        """Nothing to do here: what is saved names its classes already. Subclasses are saved with their source."""
        if not is_own(cls):
            super().register_for_auto_class(auto_class)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As Hugging Face's; every tool of theirs can load it with trust_remote_code=True (`autoload`)."""
        if self.is_remote_code():
            self.config.auto_map = dict(self.config.auto_map)
        # Before transformers writes one of its own there, as it does when it pushes.
        token = _CARD.set(read_card(save_directory))
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            _CARD.reset(token)

    def _upload_modified_files(self, working_dir: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """As Hugging Face's, with the card of the directory that is pushed or that the model was loaded from."""
        card = _CARD.get() or read_card(self.name_or_path or "")
        if card is not None:
            put_card(working_dir, card)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As Hugging Face's; layers that do not match the file's are an error, unless `output_loading_info` asks."""
        token = _TELLS.set(bool(kwargs.get("output_loading_info")))
        try:
            return super().from_pretrained(*args, **kwargs)
        finally:
            _TELLS.reset(token)

    @classmethod
    def maybe_distribute_model(
        cls,
        model: nn.Module,
        distributed_config: DistributedConfig | None,
        mesh_manager: TransformersDeviceMesh | None,
    ) -> nn.Module:
        """As Hugging Face's, called before weights are read; each layer then knows which heads and layers are here."""
        if mesh_manager is None or distributed_config is None:
            return model
        assert isinstance(model, ClearheadPreTrainedModel)
        decoder: Any = model.base_model
        parts = distributed_config.tp_size or 1
        if parts > 1 and plans.check_rules(model.tp_plan, distributed_config.tp_plan):
            variants = [layer.self_attn.variant for layer in decoder.layers]
            plans.share_heads(variants, mesh_manager.get_mesh("tp").get_local_rank(), parts)
        super().maybe_distribute_model(model, distributed_config, mesh_manager)
        decoder.look_around()
        return model

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
        if _TELLS.get():
            return
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
