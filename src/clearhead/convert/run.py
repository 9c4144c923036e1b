"""One conversion: open, plan, write beside the target, check on text, move into place.

Everything is written into `.NAME.partial` beside the target and renamed at the end, so that a failure, an interruption
or a full disk leaves no output. The weights of the result are made and checked one tensor and one layer at a time.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clearhead.convert.base import INVALID, Converter, Source
from clearhead.convert.carrying import carry, load_tokenizer
from clearhead.convert.check import EXACT, ROUNDED, Agreement, compare, precision, token_ids
from clearhead.convert.source import find_converter, open_source
from clearhead.convert.start import OtherAttention, Start
from clearhead.convert.weights import (
    FLOATS,
    ConversionError,
    FileWeights,
    MadeWeights,
    Sheet,
    Weights,
    reason,
    write_weights,
)
from clearhead.models.config import ClearheadConfig
from clearhead.registry import did_you_mean, names, resolve
from clearhead.runs.lock import exclusive

SHARD_BYTES = 5 * 10**9
RECORD = "conversion.json"
PACKAGES = ("clearhead", "torch", "transformers", "safetensors")

Say = Callable[[str], None]


@dataclass(frozen=True)
class ConversionPlan:
    """What is made of what."""

    source: Source
    reader: Converter
    format: str
    target: str
    writer: Converter
    before: ClearheadConfig
    ours: ClearheadConfig
    config: Mapping[str, Any]
    weights: Weights
    sheets: tuple[Sheet, ...]
    rounded: bool
    start: Start | None = None

    @property
    def same_function(self) -> bool:
        """Whether the result computes what the source does, and is not merely a start for training."""
        return self.start is None or self.start.same_function(self.before)


def export_names() -> tuple[str, ...]:
    """The formats that can be written."""
    return tuple(name for name in names("converters") if resolve("converters", name).exports)


def convert(
    named: str,
    out: Path,
    *,
    to: str = "clearhead",
    attention: str | None = None,
    start: Start | None = None,
    say: Say = lambda text: None,
    shard_bytes: int = SHARD_BYTES,
) -> Agreement:
    """Convert the checkpoint `named` into the new directory `out`; returns how far the logits agree.

    to:        "clearhead" or another format that can be written, with the same function.
    attention: another attention for a softmax model; the function stays the same for differential_v2 alone.
    start:     another attention in some layers, begun in some way; see `clearhead.convert.retrofit`.
    Raises ConversionError (a ValueError), in one sentence, for everything that cannot be converted, for a full disk and
    for logits that do not agree; then there is no `out`.
    """
    known = names("converters")
    if to not in export_names():
        detail = f"{to!r} can be read only" if to in known else did_you_mean(to, export_names())
        raise ConversionError(f"--to {to!r} is no format that can be written: {detail}")
    if attention is not None:
        resolve("variants", attention)
        start = OtherAttention(attention)
    _check_free(out)
    source = open_source(named)
    plan = make_plan(source, to, start)
    size = sum(sheet.size for sheet in plan.sheets)
    say(
        f"{named}: {plan.format}, {plan.before.attention}, {len(plan.sheets)} tensors, {size / 1e6:,.0f} MB to write"
    )
    with _partial(out, size) as part, _disk(out):
        sums = _write(part, plan, shard_bytes)
        carry(plan.source, part)
        say("comparing logits on text")
        agreement = _check(plan, part)
        _record(part, plan, agreement, sums)
        if plan.same_function and not agreement.holds:
            raise ConversionError(
                f"the logits of the result differ from the source's by {agreement.difference:.3g} (largest logit "
                f"{agreement.largest:.3g}, {agreement.record()['computed_in']}), more than rounding explains; nothing "
                "was kept. The source may be damaged, or its configuration may be another model's"
            )
    say(sentence(plan, agreement))
    return agreement


def _check_free(out: Path) -> None:
    """Nothing is called `out`, not even a link that leads nowhere."""
    try:
        taken = out.is_symlink() or out.exists()
    except OSError as error:
        raise ConversionError(_out_of_room(out, error)) from None
    if taken:
        raise ConversionError(f"{str(out)!r} exists already; choose another --out or remove it")


def make_plan(source: Source, to: str, start: Start | None) -> ConversionPlan:
    """Everything but the writing: configurations, tensors and their sizes, checked against each other."""
    name, reader = find_converter(source)
    before = _possible(source, lambda: reader.configuration(source))
    incoming = reader.incoming(before, source)
    _complete(source, reader, incoming)
    weights: Weights = MadeWeights(source.weights, incoming)
    ours = before
    if start is not None:
        begun, had = start, weights
        ours = _possible(source, lambda: begun.config(before, had, source))
    rounded = any(recipe.rounded for recipe in incoming.values())
    if start is not None and ours is not before:
        made_anew = start.weights(weights, before, ours)
        weights, rounded = made_anew, rounded or made_anew.rounded
    writer: Converter = resolve("converters", to)()
    try:
        written = dict(writer.written(ours))
    except ConversionError as error:
        raise ConversionError(f"{source.name!r} cannot become {to!r}: {error}") from None
    made = MadeWeights(weights, writer.outgoing(ours, weights))
    shapes = writer.shapes(written)
    sheets = tuple(Sheet(name, made.dtype(name), shape) for name, shape in shapes.items())
    written["dtype"] = _dtype_name(sheets)
    return ConversionPlan(
        source, reader, name, to, writer, before, ours, written, made, sheets, rounded or made.rounded, start
    )


def _possible(source: Source, make: Callable[[], ClearheadConfig]) -> ClearheadConfig:
    try:
        return make()
    except ConversionError as error:
        raise ConversionError(f"{source.name!r} cannot be converted: {error}") from None
    except INVALID as error:
        raise ConversionError(f"{source.name!r} cannot be converted: {reason(error)}") from None


def sentence(plan: ConversionPlan, agreement: Agreement) -> str:
    """What the check found, for the person."""
    record = agreement.record()
    found = (
        f"largest difference of logits {agreement.difference:.2g} over {agreement.tokens} tokens in "
        f"{record['computed_in']} (allowed {record['allowed']:.1g})"
    )
    if plan.same_function:
        return f"the same function: {found}"
    names = ", ".join(dict.fromkeys(kind.attention for kind in plan.ours.layer_kinds))
    return (
        f"a start for training, not the same function: {plan.before.attention} weights under {names}; "
        f"largest difference of logits {agreement.difference:.2g}"
    )


def _complete(source: Source, reader: Converter, incoming: Mapping[str, Any]) -> None:
    """Every tensor that is needed is there, as floating point, and none is there that would be lost."""
    weights = source.weights
    needed = {name for recipe in incoming.values() for name in recipe.takes}
    if missing := sorted(needed - set(weights.names())):
        raise ConversionError(
            f"{source.name!r} is incomplete: it has no tensor {missing[0]!r} ({len(missing)} such); get it again"
        )
    extra = [name for name in weights.names() if name not in needed and not name.endswith(reader.ignored)]
    if extra == ["lm_head.weight"]:
        # Some files hold a tied matrix twice.
        if not torch.equal(weights.read("lm_head.weight"), weights.read("model.embed_tokens.weight")):
            raise ConversionError(
                f"{source.name!r} has an lm_head.weight of its own, but its configuration says tie_word_embeddings"
            )
        extra = []
    if extra:
        raise ConversionError(
            f"{source.name!r} has the tensor {extra[0]!r} ({len(extra)} such), which would be lost: it is another "
            "architecture than its configuration says"
        )
    for name in needed:
        if weights.dtype(name) not in FLOATS:
            raise ConversionError(
                f"{source.name!r} has {name!r} in {str(weights.dtype(name)).removeprefix('torch.')}: quantised weights "
                "cannot be converted; convert the model that they were made from"
            )


def _dtype_name(sheets: tuple[Sheet, ...]) -> str:
    sizes: dict[torch.dtype, int] = {}
    for sheet in sheets:
        sizes[sheet.dtype] = sizes.get(sheet.dtype, 0) + sheet.size
    return str(max(sizes, key=lambda dtype: sizes[dtype])).removeprefix("torch.")


def _write(part: Path, plan: ConversionPlan, shard_bytes: int) -> dict[str, str]:
    config = {**plan.config, "transformers_version": importlib.metadata.version("transformers")}
    (part / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for name, text in plan.writer.beside().items():
        (part / name).write_text(text, encoding="utf-8")
    files = list(write_weights(part, plan.sheets, plan.weights.blocks, shard_bytes))
    return {file.name: _sha256(file) for file in files}


def _check(plan: ConversionPlan, part: Path) -> Agreement:
    vocabulary = plan.ours.vocab_size
    # The one that was carried: what cannot be loaded now could not be loaded later.
    tokenizer = load_tokenizer(part)
    ids = token_ids(tokenizer, vocabulary)[: max(2, plan.ours.max_position_embeddings)]
    written = FileWeights(sorted(part.glob("*.safetensors")))
    layer = max(
        sum(sheet.size // sheet.dtype.itemsize for sheet in plan.sheets if f".layers.{index}." in sheet.name)
        for index in range(plan.ours.num_hidden_layers)
    )
    dtype = precision(layer)
    stored_wide = all(sheet.dtype == torch.float64 for sheet in plan.sheets)
    exact = dtype == torch.float64 and (not plan.rounded or stored_wide)
    return compare(
        (plan.reader.computation(plan.source.config, plan.source.weights, dtype), plan.source.weights),
        (plan.writer.computation(plan.config, written, dtype), written),
        ids,
        vocabulary,
        dtype,
        EXACT if exact else ROUNDED,
    )


def _record(part: Path, plan: ConversionPlan, agreement: Agreement, sums: Mapping[str, str]) -> None:
    source = plan.source
    record: dict[str, Any] = {
        "source": {
            "name": Path(source.name).name if Path(source.name).exists() else source.name,
            "format": plan.format,
            "attention": plan.before.attention,
            "files": {file.name: _sha256(file) for file in source.files},
        },
        "result": {"format": plan.target, "attention": plan.ours.attention, "files": dict(sums)},
        "same_function": plan.same_function,
        **({} if plan.start is None else plan.start.record()),
        "check": agreement.record(),
        "versions": {
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in PACKAGES},
        },
    }
    if "gguf" in source.config:
        record["source"]["note"] = source.config["gguf"]
    (part / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def _partial(out: Path, size: int) -> Iterator[Path]:
    """A directory beside `out` that becomes it, or disappears."""
    part = out.with_name(f".{out.name}.partial")
    new = [parent for parent in out.parents if not parent.exists()]
    try:
        with _partial_in(out, part, size):
            yield part
    except BaseException:
        for parent in new:
            with suppress(OSError):
                parent.rmdir()
        raise


@contextmanager
def _partial_in(out: Path, part: Path, size: int) -> Iterator[None]:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out.parent).free
    except OSError as error:
        raise ConversionError(
            f"cannot write to {str(out.parent)!r} ({error.strerror or error}); choose another --out"
        ) from None
    # Beside the weights: tokenizer, configuration, record.
    needed = size + 2**24
    if free < needed:
        raise ConversionError(
            f"the result needs {needed / 1e6:,.0f} MB of disk but only {free / 1e6:,.0f} MB are free in "
            f"{str(out.parent)!r}; make room or choose another --out"
        )
    try:
        with exclusive(part, f"the conversion into {str(out)!r}"):
            # What an earlier conversion left that was killed.
            for left in part.iterdir():
                if left.name != ".lock":
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
            try:
                yield
                (part / ".lock").unlink()
                part.rename(out)
            except BaseException:
                shutil.rmtree(part, ignore_errors=True)
                raise
    except OSError as error:
        # Not even the lock was written: an empty directory is what is left.
        with suppress(OSError):
            part.rmdir()
        if isinstance(error, ValueError):
            raise
        raise ConversionError(_out_of_room(out, error)) from None


@contextmanager
def _disk(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConversionError(_out_of_room(out, error)) from None


def _out_of_room(out: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space is left for {str(out)!r}; nothing was kept; make room or choose another --out"
    return f"{str(out)!r} cannot be written ({error.strerror or error}); nothing was kept"
