"""Differential attention in a plain checkpoint: the same function at first, and one that can be trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from clearhead.convert.base import Source, refuse
from clearhead.convert.carrying import load_tokenizer
from clearhead.convert.check import Agreement
from clearhead.convert.choosing import RULE, chosen_layers, highest, measured_entropy
from clearhead.convert.inits import Init, Layer, find_init
from clearhead.convert.run import convert
from clearhead.convert.start import new_values
from clearhead.convert.weights import MadeWeights, TensorRecipe, Weights, same
from clearhead.models.config import ClearheadConfig
from clearhead.registry import did_you_mean, resolve
from clearhead.variants.base import option_names


@dataclass(frozen=True)
class RetrofitPlan:
    """What is asked for.

    attention, init: a variant and a way to begin with it (`clearhead.convert.inits`), by default its first.
    layers:  "all", "upper", "alternate" or layer numbers.
    options: of the attention, instead of the init's.
    heads:   for DEX, the share of each layer's heads, chosen by their entropy; None where `options` names heads.
    text:    what entropy is measured on; by default a short text of this library's.
    """

    attention: str
    init: str | None = None
    layers: str | tuple[int, ...] = "all"
    options: Mapping[str, Any] = field(default_factory=dict)
    heads: float = 0.5
    text: str | None = None
    seed: int = 0


class Retrofit:
    """`RetrofitPlan` as a start of a conversion; ValueError for what does not exist, before anything is read."""

    def __init__(self, plan: RetrofitPlan) -> None:
        self.plan = plan
        self.init: Init = find_init(plan.attention, plan.init)
        self.own: dict[str, Any] = {**self.init.options, **plan.options, **self.init.own_options}
        known = option_names(resolve("variants", plan.attention))
        for name in plan.options:
            if name not in known:
                raise ValueError(
                    f"attention {plan.attention!r} has no option {name!r}: {did_you_mean(name, known)}"
                )
            if name in self.init.own_options:
                raise ValueError(
                    f"--init {self.init.name} has {name} = {self.init.own_options[name]!r}; leave the option out"
                )
        if not 0.0 < plan.heads <= 1.0:
            raise ValueError(f"--heads must be a share above 0 and up to 1, not {plan.heads}")
        self.entropies: dict[int, list[float]] = {}
        self.chosen: tuple[int, ...] = ()
        self.options: dict[int, dict[str, Any]] = {}

    def outline(self, before: ClearheadConfig) -> ClearheadConfig:
        """The configuration but for what is measured on weights: DEX's heads."""
        for kind in before.layer_kinds:
            if kind.attention != "softmax" or kind.options:
                raise refuse("attention", kind.attention, "a retrofit begins with a plain softmax model")
        self.chosen = chosen_layers(self.plan.layers, before.num_hidden_layers)
        self.options = {layer: dict(self.own) for layer in self.chosen}
        return ClearheadConfig.from_dict(self._plain(before))

    def config(self, before: ClearheadConfig, weights: Weights, source: Source) -> ClearheadConfig:
        outlined = self.outline(before)
        if self.plan.attention == "dex" and "heads" not in self.own and self.plan.heads < 1.0:
            found = measured_entropy(before, weights, _tokenizer(source), self.plan.text)
            for layer in self.chosen:
                self.entropies[layer] = found[layer]
                self.options[layer]["heads"] = highest(found[layer], self.plan.heads)
            return ClearheadConfig.from_dict(self._plain(before))
        return outlined

    def _plain(self, before: ClearheadConfig) -> dict[str, Any]:
        alike = all(options == self.own for options in self.options.values())
        plain = before.to_dict()
        if len(self.chosen) == before.num_hidden_layers and alike and before.layers is None:
            return {**plain, "attention": self.plan.attention, "attention_options": self.own}
        given = before.layers or [{}]
        entries = []
        for layer in range(before.num_hidden_layers):
            entry = {
                key: value for key, value in given[layer % len(given)].items() if key != "attention_options"
            }
            if layer in self.options:
                entry |= {"attention": self.plan.attention, "attention_options": self.options[layer]}
            entries.append(entry)
        return {**plain, "layers": entries}

    def weights(self, weights: Weights, before: ClearheadConfig, after: ClearheadConfig) -> MadeWeights:
        recipes: dict[str, TensorRecipe] = {name: TensorRecipe((name,), same) for name in weights.names()}
        float32 = resolve("variants", self.plan.attention).float32_parameters
        for index in self.chosen:
            prefix = f"model.layers.{index}.self_attn"
            dtype = weights.dtype(f"{prefix}.q_proj.weight")
            generator = torch.Generator().manual_seed(self.plan.seed * 1000 + index)
            layer = Layer(before, index, self.options[index], prefix, dtype, generator)
            recipes |= self.init.projections(layer)
            for name, value in new_values(after, index, self.plan.seed).items():
                held = value if name in float32 or name.endswith("progress") else value.to(dtype)
                recipes[f"{prefix}.variant.{name}"] = TensorRecipe((), lambda held=held: held, held.dtype)
        return MadeWeights(weights, recipes)

    def same_function(self, before: ClearheadConfig) -> bool:
        return self.init.same_function

    def record(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "attention": self.plan.attention,
            "init": self.init.name,
            "layers": list(self.chosen),
            "options": self.own,
            "seed": self.plan.seed,
        }
        if self.entropies:
            found["heads"] = {
                "rule": RULE,
                "share": self.plan.heads,
                "text": "the text of the check" if self.plan.text is None else "given",
                "chosen": {str(layer): self.options[layer]["heads"] for layer in self.chosen},
                "entropy": {str(layer): values for layer, values in self.entropies.items()},
            }
        return {"retrofit": found}


def retrofit(
    named: str, out: Path, plan: RetrofitPlan, *, say: Callable[[str], None] = lambda text: None
) -> Agreement:
    """Write the checkpoint `named` with another attention, as `plan` says, into the new directory `out`.

    Both are compared on text at the end: where the way to begin keeps the function, logits that differ by more than
    rounding are an error and leave no output. Raises ConversionError (a ValueError), in one sentence, as `convert`
    does.
    """
    start = Retrofit(plan)
    agreement = convert(named, out, start=start, say=say)
    layers = ", ".join(map(str, start.chosen))
    say(f"{plan.attention}, begun as {start.init.name!r}, in the layers {layers}: {_count(out, start)}")
    return agreement


def _count(out: Path, start: Retrofit) -> str:
    from clearhead.models.causal import ClearheadForCausalLM

    config = ClearheadConfig.from_pretrained(out)
    with torch.device("meta"):
        model = ClearheadForCausalLM(config)
    new = new_numbers(model)
    return f"{new:,} new parameters of {sum(p.numel() for p in model.parameters()):,}"


def new_numbers(model: torch.nn.Module) -> int:
    """How many numbers of a model its softmax twin does not have: variants' own, and new rows of projections."""
    from clearhead.nn import ProjectedAttention

    found = 0
    for module in model.modules():
        if isinstance(module, ProjectedAttention):
            found += sum(p.numel() for p in module.variant.parameters())
            for name, rows in module.variant.new_rows().items():
                found += int(rows.sum()) * getattr(module, name).weight.shape[1]
    return found


def _tokenizer(source: Source) -> Any:
    if source.tokenizer is not None or source.folder is None:
        return source.tokenizer
    return load_tokenizer(source.folder)


def layer_numbers(text: str) -> str | tuple[int, ...]:
    """`--layers` as typed: a word, or numbers with commas between them."""
    parts: Sequence[str] = text.split(",")
    if all(part.strip().isdigit() for part in parts):
        return tuple(int(part) for part in parts)
    return text
