"""Opening what a person names as a source: a directory, a safetensors file, a GGUF file or a hub id."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clearhead.convert.base import Converter, Source
from clearhead.convert.weights import INDEX, SINGLE, ConversionError, FileWeights, MemoryWeights
from clearhead.registry import names, resolve

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*")
"""What a conversion needs of a hub's repository."""


def open_source(named: str) -> Source:
    """The checkpoint that `named` means; ConversionError, in one sentence, where it cannot be read."""
    from clearhead.evals.subjects.gguf import is_gguf

    path = Path(named)
    if is_gguf(named):
        return _from_gguf(path)
    if path.is_file():
        if path.suffix in PICKLES:
            raise _pickled(path, [path.name])
        if path.suffix != ".safetensors":
            raise ConversionError(f"{named!r} is neither a directory nor a .safetensors or .gguf file")
        return _from_files(named, path.parent, [path])
    if not path.exists():
        path = _from_hub(named)
    folder = path / "model" if not (path / "config.json").exists() and (path / "model").is_dir() else path
    return _from_files(named, folder, _weight_files(folder))


NOT_CONVERTED = {"clearhead_encoder": "an encoder", "clearhead_seq2seq": "an encoder-decoder"}
"""Families of this library without a converter, by model type."""


def find_converter(source: Source) -> tuple[str, Converter]:
    """The converter that claims the source, by name; ConversionError with all names where none does."""
    for name in names("converters"):
        converter: Converter = resolve("converters", name)()
        if converter.claims(source):
            return name, converter
    if (kind := NOT_CONVERTED.get(str(source.model_type))) is not None:
        raise ConversionError(f"{source.name!r} is {kind}; causal language models alone are converted")
    kind = "no config.json" if not source.config else f"the model type {source.model_type!r}"
    raise ConversionError(
        f"{source.name!r} has {kind} and tensors of none of the formats that can be converted: "
        f"{', '.join(names('converters'))}"
    )


def read_config(file: Path) -> dict[str, Any]:
    """A JSON object; ConversionError for anything else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ConversionError(f"{str(file)!r} cannot be read ({error}); get it again") from None
    if not isinstance(found, dict):
        raise ConversionError(f"{str(file)!r} holds {type(found).__name__}, not an object; get it again")
    return found


def _from_files(named: str, folder: Path, files: Sequence[Path]) -> Source:
    beside = [file for file in (folder / "config.json", folder / INDEX) if file.exists()]
    config = read_config(folder / "config.json") if (folder / "config.json").exists() else {}
    generation = folder / "generation_config.json"
    return Source(
        name=named,
        config=config,
        weights=FileWeights(files),
        files=(*beside, *files),
        folder=folder,
        generation=read_config(generation) if generation.exists() else None,
    )


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).exists():
        listed = read_config(folder / INDEX).get("weight_map")
        if not isinstance(listed, dict) or not all(map(_is_plain, listed.values())):
            raise ConversionError(
                f"{str(folder / INDEX)!r} has no weight_map from tensors to files beside it; get it again"
            )
        files = [folder / name for name in sorted(set(listed.values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing or not files:
            raise ConversionError(
                f"{str(folder)!r} is incomplete: {INDEX} names {missing[0] if missing else 'no files'!r}, which is not "
                "there; get it again"
            )
        return files
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found
    if found:
        raise ConversionError(
            f"{str(folder)!r} has {len(found)} .safetensors files and no {INDEX} that says what they are; give one file"
        )
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
    if pickled:
        raise _pickled(folder, pickled)
    runs = sorted(folder.glob("arms/*/seed-*/model"))
    if runs:
        raise ConversionError(f"{str(folder)!r} is a run; give one of its models, such as {str(runs[0])!r}")
    gguf = sorted(folder.glob("*.gguf"))
    hint = f"; give the file {str(gguf[0])!r}" if gguf else ""
    raise ConversionError(f"{str(folder)!r} holds no weights (no {SINGLE}){hint}")


def _is_plain(name: object) -> bool:
    """Whether it is the name of a file in a directory, and leads nowhere else."""
    return isinstance(name, str) and Path(name).name == name


def _pickled(path: Path, found: Sequence[str]) -> ConversionError:
    return ConversionError(
        f"{str(path)!r} has its weights in a pickle ({found[0]}), which can run any code when it is opened, so it is "
        "not; where you trust it, make safetensors of it: "
        "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'model.safetensors'), or "
        "AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW)"
    )


def _from_gguf(path: Path) -> Source:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from clearhead.evals.subjects.gguf import load_gguf, open_gguf, refuse_lost_scaling

    file = open_gguf(path)
    model = load_gguf(AutoModelForCausalLM, path, "the model")
    refuse_lost_scaling(file, model.config)
    config = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    config["architectures"] = [type(model).__name__]
    # The dequantised numbers are what is converted; which ones they were is recorded.
    tensors = {name: value.detach() for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    return Source(
        name=str(path),
        config={**config, "gguf": file.sentence()},
        weights=MemoryWeights(tensors),
        files=(path,),
        tokenizer=load_gguf(AutoTokenizer, path, "the tokenizer"),
        generation=model.generation_config.to_diff_dict(),
    )


def _from_hub(named: str) -> Path:
    from clearhead.evals.subjects.external import HUB_ID

    if HUB_ID.fullmatch(named) is None or "/" not in named:
        raise ConversionError(f"there is no model at {named!r}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    from clearhead.evals.reasons import reason_of

    try:
        return Path(snapshot_download(named, allow_patterns=list(WANTED)))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        raise ConversionError(
            f"{named!r} is neither here nor a model that the Hugging Face hub gave ({reason_of(error)}); check the "
            "name and the network"
        ) from None
