"""What goes along with converted weights: tokenizer, chat template, generation settings, licence."""

import json
import shutil
from pathlib import Path
from typing import Any

from clearhead.convert.base import Source
from clearhead.convert.source import read_config
from clearhead.convert.weights import ConversionError, reason
from clearhead.data.opening import NEEDS_CODE, NeedsCode, open_pretrained

TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
)
KEPT = ("LICENSE*", "NOTICE*")


def carry(source: Source, part: Path) -> None:
    """Write what goes along into `part`; ConversionError where a file of the source is damaged."""
    if source.generation is not None:
        text = json.dumps(source.generation, indent=2) + "\n"
        (part / "generation_config.json").write_text(text, encoding="utf-8")
    if source.tokenizer is not None:
        source.tokenizer.save_pretrained(part)
    if source.folder is None:
        return
    for name in TOKENIZER_FILES:
        if (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, part / name)
    _name_tokenizer_class(source.folder, part)
    for pattern in KEPT:
        for file in source.folder.glob(pattern):
            if file.is_file() and _inside(file, source.folder):
                shutil.copyfile(file, part / file.name)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder`, None where there is none; ConversionError for a damaged one and for one with code."""
    if not (folder / TOKENIZER_CONFIG).exists():
        return None
    from transformers import AutoTokenizer

    try:
        return open_pretrained(AutoTokenizer, folder)
    except (OSError, ValueError, KeyError, ImportError) as error:
        why = NEEDS_CODE if isinstance(error, NeedsCode) else reason(error)[:200]
        raise ConversionError(
            f"the source's tokenizer cannot be loaded ({why}); mend it, or move its files away to convert the "
            "weights alone"
        ) from None


def _name_tokenizer_class(folder: Path, part: Path) -> None:
    """Say which class the tokenizer is of, where only the source's model type did."""
    if not (folder / TOKENIZER_CONFIG).is_file():
        return
    settings = read_config(folder / TOKENIZER_CONFIG)
    if "tokenizer_class" in settings:
        return
    from transformers import AutoTokenizer

    try:
        found = type(open_pretrained(AutoTokenizer, folder)).__name__
    except (OSError, ValueError, KeyError, ImportError):
        found = "PreTrainedTokenizerFast"
    text = json.dumps({**settings, "tokenizer_class": found}, indent=2, ensure_ascii=False)
    (part / TOKENIZER_CONFIG).write_text(text + "\n", encoding="utf-8")


def _inside(file: Path, folder: Path) -> bool:
    """Whether a file is the source's own: a link in a repository from elsewhere may lead to any file of this machine.

    Links of Hugging Face's cache (snapshots/REVISION/NAME to blobs/SUM) stay inside the repository's folder.
    """
    root = folder.resolve()
    if root.parent.name == "snapshots":
        root = root.parent.parent
    return file.resolve().is_relative_to(root)
