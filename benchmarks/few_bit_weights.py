"""Weights in 8 and 4 bits by torchao, on a CPU: what they do to a model's logits, its bytes and a token's time.

    PYTHONPATH=DIRECTORY_OF_TORCHAO python benchmarks/few_bit_weights.py MODEL

Every linear layer is rounded, the head too: by rows in 8 bits (`Int8WeightOnlyConfig`), by groups in 4
(`PrototypeInt4WeightOnlyConfig`, which is torchao's form for CPUs). Logits are compared on the first tokens of English
pages of the standard library's documentation; a token's time is that of one step behind a page, all forms in turn, in
this process's own time where there is one thread.
"""

import argparse
import copy
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, DynamicCache

from clearhead.bench.machine import facts, versions
from clearhead.bench.measure import Call, WallTimer, interleaved, ratios, spread, warm_up
from clearhead.bench.records import append
from clearhead.data.opening import open_pretrained
from clearhead.models import ClearheadForCausalLM

OUT = Path(__file__).parent / "results" / "few_bit_weights.jsonl"
Change = Callable[[ClearheadForCausalLM], None]


def as_it_is(model: ClearheadForCausalLM) -> None:
    """float32."""


def int8(model: ClearheadForCausalLM) -> None:
    """A scale a row."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())


def int4(group: int, model: ClearheadForCausalLM) -> None:
    """A scale and a zero for each `group` columns of a row."""
    from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import quantize_

    def takes(module: nn.Module, name: str) -> bool:
        return (
            isinstance(module, nn.Linear)
            and module.out_features % 16 == 0
            and module.in_features % group == 0
        )

    quantize_(model, PrototypeInt4WeightOnlyConfig(group_size=group, set_inductor_config=False), takes)


FORMS: dict[str, Change] = {
    "float32": as_it_is,
    "int8, rows": int8,
    "int4, groups of 32": partial(int4, 32),
    "int4, groups of 64": partial(int4, 64),
}


def held_bytes(model: nn.Module) -> int:
    """Bytes of all linear layers, scales included."""
    found = 0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            names = getattr(module.weight, "tensor_data_names", None)
            tensors = [module.weight] if names is None else [getattr(module.weight, name) for name in names]
            found += sum(x.nbytes for x in tensors)
    return found


def rows_of(model: Path, count: int, length: int) -> Tensor:
    tokenizer = open_pretrained(AutoTokenizer, model)
    rows = [tokenizer(topics[name]).input_ids[:length] for name in sorted(topics)]
    return torch.tensor([row for row in rows if len(row) == length][:count])


def step(model: ClearheadForCausalLM, ids: Tensor) -> Call:
    """One token behind a prompt; the cache is cut back, so that each step is the same one."""
    cache = DynamicCache(config=model.config)
    model(ids[:, :-1], past_key_values=cache, logits_to_keep=1)

    def run() -> None:
        model(ids[:, -1:], past_key_values=cache)
        cache.crop(-1)

    return torch.no_grad()(run)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--pages", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    ids = rows_of(arguments.model, arguments.pages, arguments.length)
    plain = ClearheadForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    expected = plain(ids).logits
    entries: dict[str, dict[str, Any]] = {}
    calls: dict[str, Call] = {}
    for name, change in FORMS.items():
        model = copy.deepcopy(plain)
        change(model)
        found = model(ids).logits
        entries[name] = {
            "form": name,
            "relative_logits_error": float((found - expected).norm() / expected.norm()),
            "agree": float((found.argmax(-1) == expected.argmax(-1)).double().mean()),
            "bytes_of_linear_layers": held_bytes(model),
        }
        calls[name] = step(model, ids[:1])
    one = torch.get_num_threads() == 1
    clock = time.thread_time if one else time.perf_counter
    warm_up(calls)
    rounds = list(interleaved(calls, arguments.rounds, WallTimer(clock)))
    for name, entry in entries.items():
        took, over = spread([found[name] for found in rounds]), ratios(rounds, name, "float32")
        entry |= {
            "clock": clock.__name__,
            "ms_a_token": {"median": took.median * 1e3, "q1": took.q1 * 1e3, "q3": took.q3 * 1e3},
            "over_float32": {"median": over.median, "q1": over.q1, "q3": over.q3},
        }
        entry |= {"model": arguments.model.name, "pages": len(ids), "length": arguments.length}
        entry |= {"rounds": len(rounds), "machine": facts(), "versions": versions()}
        print(
            f"{name:20} logits {entry['relative_logits_error']:.2%}, agree {entry['agree']:.1%}, "
            f"{entry['bytes_of_linear_layers'] / 1e6:.0f} MB, {took.median * 1e3:.1f} ms a token, over float32 "
            f"{over.median:.2f} ({over.q1:.2f} to {over.q3:.2f})",
            flush=True,
        )
    append(arguments.out, list(entries.values()))


if __name__ == "__main__":
    main()
