"""Whole training steps (forward, backward, AdamW) of every variant against its twin, and of DiffLlama at the shape."""

import argparse
from collections.abc import Callable

import torch
from common import interleaved, record, summary
from transformers import DiffLlamaConfig, DiffLlamaForCausalLM, PreTrainedModel

from clearhead.models import ClearheadConfig, ClearheadForCausalLM

VARIANTS = {
    "Transformer (twin)": ("softmax", {}),
    "DIFF V1": ("differential", {}),
    "DIFF V2": ("differential_v2", {}),
    "CoCA exact": ("collinear", {"mode": "exact"}),
    "CoCA slack": ("collinear", {"mode": "slack"}),
}


def step_of(model: PreTrainedModel, ids: torch.Tensor) -> Callable[[], None]:
    """One optimiser step on `ids`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    ids = torch.randint(0, arguments.vocab, (arguments.batch, arguments.context))
    common = {
        "vocab_size": arguments.vocab,
        "hidden_size": arguments.width,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": arguments.heads,
    }
    peers = {
        name: step_of(
            ClearheadForCausalLM(ClearheadConfig(**common, attention=attention, attention_options=options)),
            ids,
        )
        for name, (attention, options) in VARIANTS.items()
    }
    inner = ClearheadConfig(**common).intermediate_size
    llama = DiffLlamaConfig(**common, intermediate_size=inner, attn_implementation="sdpa")
    peers["DiffLlama (transformers)"] = step_of(DiffLlamaForCausalLM(llama), ids)
    case = {"what": "training step", "dtype": "float32", "engine": "sdpa", **vars(arguments)}
    record("training", case, summary(interleaved(peers, arguments.rounds), "Transformer (twin)"))


if __name__ == "__main__":
    main()
