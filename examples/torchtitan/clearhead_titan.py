"""Differential and collinear attention in torchtitan's model and trainer, through their extension points.

    pip install torchtitan==0.3.0 "clearhead[hf]"
    PYTHONPATH=examples/torchtitan torchrun --nproc-per-node 8 -m torchtitan.train \\
        --module clearhead_titan --config debug_differential

Only the attention is this library's: layers, norms, losses, data, FSDP2, compilation and checkpoints are torchtitan's.
Weights go to `ClearheadForCausalLM` and back by the state-dict adapter.

Written against torchtitan 0.3.0 with PyTorch 2.13.0. What needs no GPU has run: tests/examples/test_titan.py builds and
initialises the models, compares logits and gradients with `ClearheadForCausalLM` and carries weights both ways. The
trainer has not: it takes no CPU. Data parallel only (FSDP2, HSDP); tensor, context and pipeline parallelism are refused
"""

import re
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.config import ParallelismConfig, TrainingConfig
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader
from torchtitan.models.common import CosSinRoPE, Embedding, Linear, RMSNorm
from torchtitan.models.common.attention import BaseAttention, ScaledDotProductAttention
from torchtitan.models.common.config_utils import decoder_vocab_size, make_ffn_config
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.common.param_init import depth_scaled_std
from torchtitan.models.common.rope import RoPE
from torchtitan.models.llama3 import parallelize_llama
from torchtitan.models.llama3.model import Llama3Model, Llama3TransformerBlock
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.protocols.state_dict_adapter import StateDictAdapter
from torchtitan.trainer import Trainer

from clearhead.core.masks import packed_documents
from clearhead.nn import Attention

STD = 0.02
NORM_INIT = {"weight": nn.init.ones_}


class TitanAttention(BaseAttention):
    """torchtitan's attention module around `clearhead.nn.Attention`: (B, L, dim) -> (B, L, dim).

    n_heads, n_kv_heads: the Transformer's, whatever the variant makes of them.  options: the variant's own.
    rope: its theta and length count; the turning is the layer's.  inner_attention: torchtitan asks it for a mask, and
    SDPA's is none, as documents are read off `positions` here.  backend: an engine of this library, or "auto".
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseAttention.Config):
        dim: int
        n_kv_heads: int | None = None
        layer_id: int
        variant: str = "softmax"
        options: dict[str, Any] = field(default_factory=dict)
        backend: str = "auto"
        rope: RoPE.Config

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.layer = self._built()

    def _built(self) -> Attention:
        config = self.config
        return Attention(
            config.dim,
            config.n_heads,
            num_kv_heads=config.n_kv_heads,
            variant=config.variant,
            layer_idx=config.layer_id,
            rope_theta=config.rope.theta,
            max_positions=config.rope.max_seq_len,
            backend=config.backend,
            **config.options,
        )

    def forward(self, x: Tensor, attention_masks: object = None, positions: Tensor | None = None) -> Tensor:
        documents = None if positions is None else packed_documents(positions)
        return self.layer(x, is_causal=True, documents=documents, positions=positions)

    def _init_self_parameters(self) -> None:
        """After the model was made on the meta device, where nothing has a value."""
        deviations = {"o_proj": depth_scaled_std(STD, self.config.layer_id)}
        for name, module in self.layer.named_children():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=deviations.get(name, STD))
        part: Any
        for part in self.layer.variant.modules():
            if isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=STD)
            elif hasattr(part, "reset_parameters"):
                part.reset_parameters()

    def _init_self_buffers(self, *, buffer_device: torch.device | None = None) -> None:
        """The angles of a new layer."""
        made = dict(self._built().named_buffers())
        for name, buffer in self.layer.named_buffers():
            buffer.copy_(made[name])


class TitanModel(Llama3Model):
    """torchtitan's Llama 3 with `TitanAttention` in its blocks."""

    @dataclass(kw_only=True, slots=True)
    class Config(Llama3Model.Config):
        def update_from_config(self, *, config: Any, **kwargs: Any) -> None:
            Decoder.Config.update_from_config(self, config=config, **kwargs)
            asked = config.parallelism
            for kind in ("tensor", "context", "pipeline"):
                if getattr(asked, f"{kind}_parallel_degree") > 1:
                    raise NotImplementedError(
                        f"{kind}_parallel_degree must be 1: attention of clearhead is data parallel here"
                    )
            if asked.spmd_backend != "partial_dtensor":
                raise NotImplementedError(
                    f'parallelism.spmd_backend must be "partial_dtensor", not {asked.spmd_backend!r}: the attention '
                    "has no declarations for the others"
                )

    def verify_module_protocol(self) -> None:
        """The attention's own parts are plain modules, which `TitanAttention` initialises."""
        for name, module in self.named_modules():
            if ".attention.layer" not in name and not hasattr(module, "init_states"):
                raise RuntimeError(f"{name} ({type(module).__name__}) is no module of torchtitan")


NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "attention.layer": "self_attn",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "norm": "model.norm",
    "lm_head": "lm_head",
}


class ClearheadAdapter(StateDictAdapter):
    """torchtitan's names of weights to those of `ClearheadForCausalLM`, and back."""

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {_renamed(name, NAMES, "layers", "model.layers"): v for name, v in state_dict.items()}

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        back = {theirs: ours for ours, theirs in NAMES.items()}
        return {_renamed(name, back, "model.layers", "layers"): v for name, v in hf_state_dict.items()}


def _renamed(name: str, names: dict[str, str], before: str, after: str) -> str:
    place = re.fullmatch(rf"(?:{re.escape(before)}\.(\d+)\.)?(.+)", name)
    assert place is not None
    layer, rest = place.groups()
    for old in sorted(names, key=len, reverse=True):
        if rest.startswith(f"{old}."):
            rest = names[old] + rest[len(old) :]
            return rest if layer is None else f"{after}.{layer}.{rest}"
    raise ValueError(f"{name!r} is no weight of these models; they have {', '.join(names)}")


def model(
    variant: str,
    *,
    dim: int,
    layers: int,
    heads: int,
    hidden: int,
    vocabulary: int,
    length: int,
    theta: float = 10_000.0,
    **options: Any,
) -> TitanModel.Config:
    """The configuration of a model of any variant."""
    linear = {"weight": partial(nn.init.trunc_normal_, std=STD)}

    def norm() -> RMSNorm.Config:
        return RMSNorm.Config(normalized_shape=dim, param_init=NORM_INIT)

    def block(layer: int) -> Llama3TransformerBlock.Config:
        return Llama3TransformerBlock.Config(
            attention_norm=norm(),
            ffn_norm=norm(),
            attention=TitanAttention.Config(
                dim=dim,
                n_heads=heads,
                layer_id=layer,
                variant=variant,
                options=options,
                rope=CosSinRoPE.Config(dim=dim // heads, max_seq_len=length, theta=theta),
                inner_attention=ScaledDotProductAttention.Config(),
            ),
            feed_forward=make_ffn_config(
                dim=dim, hidden_dim=hidden, w1_param_init=linear, w2w3_param_init=linear
            ),
        )

    embedding = {"weight": partial(nn.init.normal_, std=1.0)}
    head = {"weight": partial(nn.init.trunc_normal_, std=dim**-0.5)}
    return TitanModel.Config(
        dim=dim,
        vocab_size=vocabulary,
        tok_embeddings=Embedding.Config(num_embeddings=vocabulary, embedding_dim=dim, param_init=embedding),
        norm=norm(),
        lm_head=Linear.Config(in_features=dim, out_features=vocabulary, param_init=head),
        layers=[block(layer) for layer in range(layers)],
    )


def debug(variant: str, **options: Any) -> Trainer.Config:
    """torchtitan's debug model and data with another attention."""
    sizes = {"dim": 256, "layers": 6, "heads": 16, "hidden": 768, "vocabulary": 2048, "length": 2048}
    spec = ModelSpec(
        name="clearhead",
        flavor=f"debug_{variant}",
        model=model(variant, **sizes, **options),
        parallelize_fn=parallelize_llama,
        pipelining_fn=None,
        post_optimizer_build_fn=None,
        state_dict_adapter=ClearheadAdapter,
    )
    return Trainer.Config(
        loss=CrossEntropyLoss.Config(global_vocab_size=decoder_vocab_size(spec)),
        hf_assets_path="./tests/assets/tokenizer",
        model_spec=spec,
        optimizer=default_adamw(lr=8e-4),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=2),
        training=TrainingConfig(local_batch_size=8, seq_len=2048, steps=10),
        dataloader=HuggingFaceTextDataLoader.Config(dataset="c4_test"),
        metrics=MetricsProcessor.Config(log_freq=1),
        parallelism=ParallelismConfig(spmd_backend="partial_dtensor"),
        checkpoint=CheckpointManager.Config(interval=10, last_save_model_only=False),
    )


def debug_softmax() -> Trainer.Config:
    return debug("softmax")


def debug_differential() -> Trainer.Config:
    return debug("differential")


def debug_differential_v2() -> Trainer.Config:
    return debug("differential_v2")


def debug_collinear() -> Trainer.Config:
    return debug("collinear", mode="exact")
