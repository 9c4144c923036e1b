"""Greedy text behind a quantised cache beside the same model's text behind its whole cache: how many tokens are equal?

    python benchmarks/generated_text.py MODEL     # a directory or a GGUF file (make generated-text: SmolLM2-135M)

Prompts are the first tokens of English pages of the standard library's documentation (`pydoc_data.topics`), long enough
that most of a cache is codes. All prompts are one batch. Each is read once, and every form of cache is filled with the
keys and values of that pass, as a cache that was there from the start would be: a prompt attends to itself in full
precision. Then `--new` tokens are written twice:

* *fed*: each form is fed the tokens of the whole cache's text; "agree" is the same next token after the same text;
* *free*: each form goes on with its own tokens. "Equal" is a token that stands at the same position in both texts.
  After one different token they are different texts, so this falls with the first difference, not the number of them.
  Prompts all of whose tokens agree are not written again: their text is the same.

The margin is the best logit minus the second of the whole cache: a token changes only where a form moves two logits by
more than that against one another. Forms with a block or a group of their own, and those of keys or values alone, are
imitated: numbers that were rounded to codes and back, in a cache of numbers.
"""

import argparse
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from clearhead.bench.machine import facts, versions
from clearhead.bench.records import append
from clearhead.convert.run import convert
from clearhead.data.opening import open_pretrained
from clearhead.models import ClearheadForCausalLM, QuantisedCache

OUT = Path(__file__).parent / "results" / "generated_text.jsonl"
MakeCache = Callable[[PreTrainedModel], Cache]


@dataclass(frozen=True, slots=True)
class Rounding:
    """What an imitated cache does to tokens that have left the newest `newest`, in whole blocks of `block`.

    bits: of keys and of values; None leaves them. group: channels of a value that share a scale.
    first: whether the first token's keys and values stay as they are, which most heads look at much of the time.
    """

    key_bits: int | None = 8
    value_bits: int | None = 8
    block: int = 128
    group: int = 64
    newest: int = 32
    first: bool = False


class RoundedLayer(DynamicLayer):
    """A layer of numbers, the older of which have been codes."""

    def __init__(self, rounding: Rounding) -> None:
        super().__init__()
        self.rounding, self.sealed = rounding, 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As `QuantisedLayer`: the tokens that become codes now are still numbers to this call."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        own = self.rounding
        end = max(0, keys.shape[2] - own.newest) // own.block * own.block
        if end > self.sealed:
            new = slice(self.sealed, end)
            self.keys, self.values = keys.clone(), values.clone()
            if own.key_bits is not None:
                blocks = keys[:, :, new].unflatten(2, (-1, own.block))
                self.keys[:, :, new] = rounded(blocks, 3, own.key_bits).flatten(2, 3)
            if own.value_bits is not None:
                groups = values[:, :, new].unflatten(3, (-1, min(own.group, values.shape[3])))
                self.values[:, :, new] = rounded(groups, 4, own.value_bits).flatten(3, 4)
            if own.first and not self.sealed:
                self.keys[:, :, 0], self.values[:, :, 0] = keys[:, :, 0], values[:, :, 0]
            self.sealed = end
        return keys, values


def rounded(x: Tensor, along: int, bits: int) -> Tensor:
    """x as codes of so many bits and back, one scale for the numbers along a dimension; 16 bits are bfloat16."""
    if bits == 16:
        return x.bfloat16().to(x.dtype)
    least, most = x.amin(along, keepdim=True), x.amax(along, keepdim=True)
    scale = ((most - least) / (2**bits - 1)).clamp(min=2.0**-120)
    return ((x - least) / scale).round() * scale + least


def imitated(rounding: Rounding, model: PreTrainedModel) -> Cache:
    """A cache that rounds as `rounding` says."""
    return Cache(layers=[RoundedLayer(rounding) for _ in range(model.config.num_hidden_layers)])


def quantised(bits: int, newest: int, model: PreTrainedModel) -> Cache:
    """The library's own."""
    return QuantisedCache(model.config, bits, newest)


def whole(model: PreTrainedModel) -> Cache:
    """All numbers as they are."""
    return DynamicCache(config=model.config)


# The whole cache by another backend than the model's own choice: what rounding in float32 alone does to a text.
CONTROL = "whole, other backend"
FORMS: dict[str, MakeCache] = {
    CONTROL: whole,
    "bfloat16 (imitated)": partial(imitated, Rounding(16, 16)),
    "int8, newest 32": partial(quantised, 8, 32),
    "int8, newest 128": partial(quantised, 8, 128),
    "int8, newest 256": partial(quantised, 8, 256),
    "int8, imitated": partial(imitated, Rounding()),
    "int8, first token whole (imitated)": partial(imitated, Rounding(first=True)),
    "int8, blocks of 32, groups of 32 (imitated)": partial(imitated, Rounding(block=32, group=32)),
    "int8, keys alone (imitated)": partial(imitated, Rounding(value_bits=None)),
    "int8, values alone (imitated)": partial(imitated, Rounding(key_bits=None)),
    "int4, newest 32": partial(quantised, 4, 32),
    "int4, newest 128": partial(quantised, 4, 128),
}


@dataclass(frozen=True, slots=True)
class Written:
    """tokens (prompts, new) and the logits (prompts, new, V) that they were chosen from."""

    tokens: Tensor
    logits: Tensor


def filled(model: PreTrainedModel, make: MakeCache, read: Cache, rows: Tensor | slice = slice(None)) -> Cache:
    """A new cache with the keys and values of some rows of `read`."""
    cache = make(model)
    for index, layer in enumerate(read.layers):
        assert isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None
        cache.update(layer.keys[rows], layer.values[rows], index)
    return cache


def write(
    model: PreTrainedModel, cache: Cache, first: Tensor, new: int, fed: Tensor | None = None
) -> Written:
    """`new` tokens greedily behind a prompt's cache, or the next tokens that `fed` (prompts, new) asks for.

    first (prompts, V): logits of the prompt's last token.
    """
    logits = [first]
    tokens = [first.argmax(-1)]
    for step in range(new - 1):
        given = tokens[-1] if fed is None else fed[:, step]
        out = model(input_ids=given[:, None], past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits.append(out.logits[:, -1].float())
        tokens.append(logits[-1].argmax(-1))
    return Written(torch.stack(tokens, 1), torch.stack(logits, 1))


def first_difference(a: Tensor, b: Tensor) -> list[int | None]:
    """By row the first position whose tokens differ; None where none does."""
    found = []
    for row in a != b:
        places = row.nonzero().flatten()
        found.append(int(places[0]) if len(places) else None)
    return found


def compared(reference: Written, free: Tensor, fed: Written) -> dict[str, Any]:
    """What a form did to the text. Position 0 is chosen from the prompt's own logits and cannot differ."""
    best = reference.logits.topk(2, -1).values
    margins = best[..., 0] - best[..., 1]
    first = first_difference(reference.tokens, free)
    differs = fed.tokens != reference.tokens
    # How far a form moves the reference's two best tokens against one another.
    pair = reference.logits.topk(2, -1).indices
    gap = fed.logits.gather(-1, pair)
    moved = (gap[..., 0] - gap[..., 1] - margins).abs()[:, 1:]
    logs = reference.logits.log_softmax(-1)
    divergence = (logs.exp() * (logs - fed.logits.log_softmax(-1))).sum(-1)[:, 1:]
    at = [float(margins[i, place]) for i, place in enumerate(first) if place is not None]
    return {
        "equal": float((free == reference.tokens).double().mean()),
        "agree": float((~differs[:, 1:]).double().mean()),
        "texts_equal": sum(place is None for place in first),
        "first_difference": first,
        "margin_at_first_difference": [round(value, 5) for value in at],
        "margin_median": float(margins.median()),
        "margins_below": {
            str(x): float((margins[:, 1:] < x).double().mean()) for x in (0.01, 0.05, 0.1, 0.5)
        },
        "moved_median": float(moved.median()),
        "moved_largest": float(moved.max()),
        "kl_nats": float(divergence.mean()),
        "relative_logits_error": float(
            (fed.logits - reference.logits)[:, 1:].norm() / reference.logits[:, 1:].norm()
        ),
    }


def prompts(model: Path, count: int, length: int) -> tuple[list[str], Tensor]:
    """The first `length` tokens of the first `count` pages that have so many, by name."""
    tokenizer = open_pretrained(AutoTokenizer, model)
    rows = {name: tokenizer(topics[name]).input_ids for name in sorted(topics)}
    long = {name: row[:length] for name, row in rows.items() if len(row) >= length}
    if len(long) < count:
        raise ValueError(f"--prompts {count}: only {len(long)} pages have {length} tokens; ask for fewer")
    chosen = dict(list(long.items())[:count])
    return list(chosen), torch.tensor(list(chosen.values()))


@torch.no_grad()
def study(model: PreTrainedModel, ids: Tensor, new: int, names: list[str]) -> Iterator[dict[str, Any]]:
    """A record of each form, as it is measured."""
    read: Cache = DynamicCache(config=model.config)
    first = model(input_ids=ids, past_key_values=read, use_cache=True, logits_to_keep=1).logits[:, -1].float()
    own = model.config._attn_implementation
    reference = write(model, filled(model, whole, read), first, new)
    for name in names:
        make = FORMS[name]
        model.set_attn_implementation("cpu" if name == CONTROL else own)
        fed = write(model, filled(model, make, read), first, new, reference.tokens)
        free = reference.tokens.clone()
        rows = (fed.tokens != free).any(1).nonzero().flatten()
        if len(rows):
            free[rows] = write(model, filled(model, make, read, rows), first[rows], new).tokens
        yield {"form": name, **compared(reference, free, fed)}
    model.set_attn_implementation(own)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--new", type=int, default=100)
    parser.add_argument("--form", action="append", choices=[*FORMS], help="only these; may be given again")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        source = arguments.model
        if source.is_file():
            source = Path(folder) / "model"
            convert(str(arguments.model), source)
        pages, ids = prompts(source, arguments.prompts, arguments.length)
        model = ClearheadForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    weights = sum(x.numel() for x in nn.Module.parameters(model))
    about = {"model": arguments.model.name, "weights": weights, "python": platform.python_version()}
    sizes = {"prompts": len(pages), "length": arguments.length, "new": arguments.new, "pages": pages}
    for record in study(model, ids, arguments.new, arguments.form or [*FORMS]):
        print(
            f"{record['form']:45} equal {record['equal']:.1%}, agree {record['agree']:.2%}, texts equal "
            f"{record['texts_equal']}, moved {record['moved_median']:.4f}, margin {record['margin_median']:.2f}",
            flush=True,
        )
        append(arguments.out, [{**record, **about, **sizes, "machine": facts(), "versions": versions()}])


if __name__ == "__main__":
    main()
