"""The run directory: whether it belongs to this recipe, can be written to, and will fit on the disk."""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from clearhead.data.began import check_sets, check_text, check_tokens
from clearhead.runs.environment import environment
from clearhead.runs.files import read_object, write_json, write_text
from clearhead.runs.lock import RunError, exclusive
from clearhead.runs.recipe import Recipe, RecipeError
from clearhead.runs.recipe_io import differences, dump_toml, parse_recipe, read_toml

# Changing these does not change what a trained model is, so they may differ between calls on one run directory.
DATA = "data.json"
LOOK_PAGE = "look.html"
FREE_KEYS = ("description", "seeds", "evaluate")
FREE_TRAIN_KEYS = ("workers", "threads", "save_every", "report_to")
# The rows of a step are the same; their sums move by a rounding, as with another number of processes.
FREE_PARALLEL_KEYS = ("rows", "checkpointing")


def check_writable(directory: Path) -> None:
    """Create `directory` and prove that files can be written in it; RunError otherwise."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # Always the same name: what a killed process leaves goes with the next.
        probe = directory / ".probe"
        try:
            with probe.open("wb") as file:
                file.write(b"0" * 4096)
                file.flush()
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise RunError(
            f"cannot write to {str(directory)!r} ({error.strerror or error}); choose another directory with --out"
        ) from None


def check_space(directory: Path, needed: int) -> None:
    """RunError when the disk of `directory` has less than `needed` bytes left."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise RunError(
            f"the run needs about {_size(needed)} of disk but only {_size(free)} are free in {str(directory)!r}; "
            "make room or choose another directory with --out"
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def open_run(directory: Path, recipe: Recipe) -> None:
    """Make `directory` the run directory of `recipe`: refuse one made by a different recipe, write recipe and env.

    Seeds, arms and evaluations may be added to a run; RunError names any other key that differs.
    """
    written = directory / "recipe.toml"
    if written.exists():
        changed = _changes(written, recipe)
        if changed:
            raise RunError(
                f"{str(directory)!r} was made by a different recipe ({'; '.join(changed[:5])}"
                f"{f'; and {len(changed) - 5} more' if len(changed) > 5 else ''}); "
                "choose another --out, or --fresh to set the old run aside and begin again"
            )
    elif any(not entry.name.startswith(".") for entry in directory.iterdir()):
        raise RunError(f"{str(directory)!r} is not empty and not a run directory; choose another --out")
    write_text(written, dump_toml(recipe))
    if not (directory / "env.json").exists():
        write_json(directory / "env.json", environment())


def kept_data(directory: Path) -> dict[str, Any] | None:
    """What the run or the job in `directory` began with; None where nothing says so: it was made before that was kept.

    A job made before jobs kept it is held to what its run says.
    """
    places = [directory]
    if (directory / "job.json").exists():
        places += [parent for parent in directory.absolute().parents[:4] if (parent / "recipe.toml").exists()]
    return next((read_object(place / DATA) for place in places if (place / DATA).exists()), None)


def keep_data(directory: Path, identity: Mapping[str, Any], sets: Mapping[str, str] | None = None) -> None:
    """Record in `data.json` what the run, or a job of it, trains on and is evaluated on.

    sets: the fingerprints of the files that its evaluations read. RunError when it began with something else.
    """
    before = read_object(directory / DATA) if (directory / DATA).exists() else {}
    known = before.get("evaluation_sets", {})
    try:
        check_text(before, identity, ({}, {}))
        check_tokens(before, identity, directory)
        check_sets(known, sets or {})
    except ValueError as error:
        raise RunError(f"{str(directory)!r}: {error}") from None
    found = {**identity, "evaluation_sets": {**known, **(sets or {})}}
    if found != before:
        write_json(directory / DATA, found)


def set_aside(directory: Path, say: Callable[[str], None]) -> None:
    """Rename an existing run directory to the first free `NAME.old-N`.

    RunError while another process uses it, and for what is not a run: nobody asked for that to be moved.
    """
    if not directory.exists() or not any(directory.iterdir()):
        return
    with exclusive(directory, f"the run {str(directory)!r}"):
        if all(entry.name.startswith(".") for entry in directory.iterdir()):
            return
        if not (directory / "recipe.toml").is_file():
            raise RunError(
                f"{str(directory)!r} is not a run directory (it has no recipe.toml), so --fresh leaves it alone; "
                "choose another --out"
            )
        number = 1
        while (target := directory.with_name(f"{directory.name}.old-{number}")).exists():
            number += 1
        directory.rename(target)
    say(f"the earlier run is now in {target}")


def _changes(written: Path, recipe: Recipe) -> list[str]:
    try:
        old = parse_recipe(read_toml(written), source=str(written))
    except RecipeError as error:
        return [f"its recipe is not one of this version: {error}"]
    before, after = _fixed(old), _fixed(recipe)
    shared = {arm["name"] for arm in before["arms"]} & {arm["name"] for arm in after["arms"]}
    for plain in (before, after):
        plain["arms"] = {arm["name"]: arm for arm in plain["arms"] if arm["name"] in shared}
    return differences(before, after)


def drop_free(train: dict[str, Any]) -> None:
    """Take out of a plain [train] what may differ between calls on one run directory."""
    for key in FREE_TRAIN_KEYS:
        del train[key]
    for key in FREE_PARALLEL_KEYS:
        del train["parallel"][key]


def _fixed(recipe: Recipe) -> dict[str, Any]:
    plain = recipe.model_dump(mode="json")
    for key in FREE_KEYS:
        del plain[key]
    drop_free(plain["train"])
    # Where shards lie is free; whether there are some is not.
    corpus = plain["corpus"]
    corpus["tokenized"] = corpus["tokenized"] is not None or corpus["sources"] is not None
    return plain
