"""`clearhead tokenize`: the text of a recipe as tokens on disk, before anything is trained."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clearhead.cli.console import AsJson, interruptible, print_json, say

if TYPE_CHECKING:
    from clearhead.data.prepare import PreparedData


def command(
    recipe: Annotated[Path, typer.Argument(help="A recipe, such as recipes/demo.toml.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Overrides of the recipe: corpus.tokenized=/data/tokens"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tokenize the text of RECIPE, which compare and train do too before they begin.

    Of text in shards every shard that is there is read and compared with its checksum; a damaged one is made again.
    Interrupted at any moment, the same command goes on behind the last finished shard.
    """
    from clearhead.data.prepare import prepare
    from clearhead.runs.recipe_io import load_recipe
    from clearhead.runs.rows import data_spec

    loaded = load_recipe(recipe, overrides or [])
    with interruptible("interrupted: the same command goes on behind the last finished shard"):
        data = prepare(data_spec(loaded), progress=say, verify=True)
        found = summary(data)
    if as_json:
        print_json(found)
        return
    for name, counts in found["sources"].items():
        part = f", {counts['share']:.1%} of the rows" if len(found["sources"]) > 1 else ""
        print(
            f"{name}: {counts['documents']:,} documents, {counts['tokens']:,} tokens{part}: {counts['folder']}"
        )
    print(
        f"held out: {found['validation']['documents']:,} documents, {found['validation']['tokens']:,} tokens"
    )
    print(f"vocabulary: {found['vocab_size']:,}")


def summary(data: "PreparedData") -> dict[str, Any]:
    """What there is to train on, by source."""
    from clearhead.data.streamed import StreamedText
    from clearhead.data.weights import WHOLE

    if isinstance(data.train, StreamedText):
        sources = {
            one.name: {
                "documents": one.documents,
                "tokens": one.num_tokens,
                "bytes": one.text_bytes,
                "share": part / WHOLE,
                "shards": len(one.shards),
                "folder": str(one.folder),
            }
            for one, part in zip(data.train.sources, data.train.shares, strict=True)
        }
    else:
        folder = data.train.folder
        sources = {
            str(data.identity["corpus"]["source"]): {
                **data.identity["train"],
                "share": 1.0,
                "folder": str(folder),
            }
        }
    return {
        "sources": sources,
        "validation": data.identity["validation"],
        "vocab_size": data.identity["vocab_size"],
    }
