"""Recipes as files: read TOML, apply `a.b=c` overrides, check everything that can be checked before a run, write."""

import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from clearhead.registry import did_you_mean, names, resolve
from clearhead.runs.files import read_object
from clearhead.runs.recipe import (
    ARM_TRAIN_KEYS,
    FROM,
    RESERVED_MODEL_KEYS,
    Arm,
    Evaluate,
    Job,
    Recipe,
    RecipeError,
    Train,
)
from clearhead.runs.secrets import redacted

Location = tuple[int | str, ...]
M = TypeVar("M", bound=BaseModel)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and check a recipe.

    path:      a TOML file.
    overrides: `key=value` with a dotted key (`train.tokens=1000`, `arms.0.train.learning_rate=2e-3`; an arm also by its
        name). The value is TOML; what is not TOML is taken as a string.

    Raises RecipeError, one sentence that names the file (or the override) and the key.
    """
    raw = read_toml(path)
    given = [_override(raw, text) for text in overrides]
    return parse_recipe(raw, source=str(path), overrides=given)


def read_toml(path: Path, kind: str = "recipe") -> dict[str, Any]:
    """The tables of a file. Raises RecipeError, which calls it a `kind`, if it is missing, unreadable or not TOML."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"there is no {kind} {str(path)!r}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"the {kind} {str(path)!r} cannot be read: {error}") from None
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits
        raise RecipeError(f"{path}: not valid TOML: {error}") from None


def parse_recipe(
    raw: Mapping[str, Any], *, source: str, overrides: Iterable[tuple[Location, str]] = ()
) -> Recipe:
    """Check a recipe given as plain tables. `source` is what errors call it."""
    origins = dict(overrides)
    recipe = validate(Recipe, raw, source, (), origins)
    _cross_check(recipe, source, origins)
    return recipe


def load_job(path: Path) -> Job:
    """Read a `job.json`. Raises RecipeError, or BrokenFile, that names the file when it is not one of this version."""
    return validate(Job, read_object(path), str(path), (), {})


def dump_toml(recipe: Recipe) -> str:
    """The resolved recipe, every default written out; reading it again gives an equal recipe."""
    import tomli_w

    return tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True))


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """One entry per key in which two plain recipes differ: `train.tokens: 5000 -> 9000`."""
    found = []
    for key in sorted({*old, *new}):
        name = f"{prefix}{key}"
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += differences(before, after, f"{name}.")
        elif before != after:
            found.append(f"{name}: {_short(before)} -> {_short(after)}")
    return found


def _short(value: Any) -> str:
    if value is None:
        return "not set"
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def option_values(given: Sequence[str]) -> dict[str, Any]:
    """`name=value` as typed: the value is TOML; what is not TOML is taken as a string."""
    found: dict[str, Any] = {}
    for text in given:
        location, _ = _override(found, text)
        if len(location) > 1:
            raise RecipeError(f"the option {text!r} is not of the form name=value")
    return found


def _override(raw: dict[str, Any], override: str) -> tuple[Location, str]:
    """Apply one override to `raw` in place; returns the place it changed and its text."""
    key, equals, value_text = override.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"the override {override!r} is not of the form key=value")
    try:
        value = tomllib.loads(f"value = {value_text}")["value"]
    except (ValueError, RecursionError):
        value = value_text
    parts = [part.strip() for part in key.split(".")]
    place: Any = raw
    location: list[int | str] = []
    for position, part in enumerate(parts):
        last = position == len(parts) - 1
        if isinstance(place, list):
            index = _index(place, part, override)
            location.append(index)
            if last:
                place[index] = value
            else:
                place = place[index]
        elif isinstance(place, dict):
            location.append(part)
            if last:
                place[part] = value
            else:
                place = place.setdefault(part, {})
        else:
            raise RecipeError(f"the override {override!r}: {'.'.join(parts[:position])!r} is not a table")
    return tuple(location), override


def _index(items: list[Any], part: str, override: str) -> int:
    if part.isdigit() and int(part) < len(items):
        return int(part)
    arms = [item.get("name") for item in items if isinstance(item, dict)]
    if part in arms:
        return arms.index(part)
    raise RecipeError(f"the override {override!r}: there is no {part!r}; use 0 to {len(items) - 1} or a name")


def validate(model: type[M], raw: Any, source: str, prefix: Location, origins: Mapping[Location, str]) -> M:
    """`raw` as `model`, strictly. Raises RecipeError that names `source` and the key below `prefix`."""
    try:
        # By way of JSON: there a list is a tuple, while a string is still no number.
        return model.model_validate_json(json.dumps(raw, default=str))
    except ValidationError as error:
        details = error.errors()
        said = _sentence(model, details[0], len(details), source, prefix, origins)
        raise RecipeError(redacted(said)) from None


def _sentence(
    model: type[BaseModel],
    detail: ErrorDetails,
    count: int,
    source: str,
    prefix: Location,
    origins: Mapping[Location, str],
) -> str:
    location = (*prefix, *detail["loc"])
    key = ".".join(map(str, location))
    where = next(
        (f"the override {text!r}" for place, text in origins.items() if place[: len(location)] == location),
        source,
    )
    more = f" (and {count - 1} more)" if count > 1 else ""
    if detail["type"] == "extra_forbidden":
        known = _fields(model, detail["loc"][:-1])
        return f"{where}: unknown key {key!r}; {did_you_mean(str(location[-1]), known)}{more}"
    if detail["type"] == "missing":
        return f"{where}: the key {key!r} is missing{more}"
    message = detail["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    # A check over a whole table names its keys itself; its input would be the whole table.
    got = "" if detail["type"] == "value_error" else f", got {_short(detail['input'])}"
    return f"{where}: {key}: {message}{got}{more}" if key else f"{where}: {message}{got}{more}"


def _fields(model: type[BaseModel], location: Location) -> list[str]:
    """The keys of the table at `location` inside `model`."""
    for part in location:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        nested = [
            kind for kind in _kinds(annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)
        ]
        if not nested:
            return []
        model = nested[0]
    return list(model.model_fields)


def _kinds(annotation: Any) -> list[Any]:
    """A type and all that it is made of: of `list[Arm] | None` also `Arm`."""
    return [annotation, *(kind for one in get_args(annotation) for kind in _kinds(one))]


def _cross_check(recipe: Recipe, source: str, origins: Mapping[Location, str]) -> None:
    """What no single table can check."""
    length, batch = recipe.data.length, recipe.train.batch_tokens
    if batch % length:
        raise RecipeError(
            f"{source}: train.batch_tokens = {batch} is not a multiple of data.length = {length}; "
            f"the nearest that is: {max(1, round(batch / length)) * length}"
        )
    rows = recipe.train.parallel.rows
    if rows and batch // length % rows:
        raise RecipeError(
            f"{source}: train.parallel.rows = {rows} does not divide the {batch // length} rows of a step "
            f"(train.batch_tokens / data.length); make train.batch_tokens a multiple of {rows * length}, or change rows"
        )
    budgets = {
        "train.tokens": recipe.train.tokens,
        "sweep.tokens": None if recipe.sweep is None else recipe.sweep.tokens,
    }
    for key, tokens in budgets.items():
        if tokens is not None and tokens < batch:
            raise RecipeError(
                f"{source}: {key} = {tokens} is less than one step (train.batch_tokens = {batch})"
            )
    _distinct(source, "seeds", recipe.seeds)
    _distinct(source, "evaluate.suites", recipe.evaluate.suites)
    _distinct(source, "arms name", [arm.name for arm in recipe.arms])
    _distinct(source, "arms directory", [arm.slug for arm in recipe.arms])
    if FROM in recipe.model:
        _check_from(recipe, source)
    for index, arm in enumerate(recipe.arms):
        _check_arm(recipe, arm, index, source, origins)
    if recipe.sweep is not None:
        shared = sorted(set(recipe.sweep.seeds) & set(recipe.seeds))
        if shared:
            raise RecipeError(
                f"{source}: sweep.seeds and seeds share {shared}; a learning rate chosen on a compared seed flatters it"
            )
    check_evaluate(recipe.evaluate, source, origins)


def _check_from(recipe: Recipe, source: str) -> None:
    """What a recipe that begins with a checkpoint may say of its model."""
    named = recipe.model[FROM]
    if not isinstance(named, str) or not named.strip():
        raise RecipeError(f"{source}: model.from must name a checkpoint, got {_short(named)}")
    if others := [key for key in recipe.model if key != FROM]:
        raise RecipeError(
            f"{source}: model.{others[0]} cannot be set beside model.from: the model is the checkpoint's"
        )
    if recipe.tokenizer.source == "bpe":
        raise RecipeError(
            f"{source}: model.from needs the checkpoint's own tokenizer: set tokenizer.source to its directory"
        )


def _check_begun(recipe: Recipe, arm: Arm, here: str) -> None:
    """What an arm may say of its model beside model.from; whether its attention is the checkpoint's is seen later."""
    if arm.model:
        raise RecipeError(
            f"{here}: beside model.from the model is the checkpoint's: leave out the arm's model"
        )
    if arm.retrofit is not None and recipe.task != "causal":
        raise RecipeError(
            f'{here}: task = "{recipe.task}" knows no retrofit: the attention is that of the checkpoint in model.from'
        )
    if arm.retrofit is not None and (arm.attention != "softmax" or arm.attention_options):
        raise RecipeError(
            f"{here}: its attention is retrofit's: leave out attention and attention_options of the arm"
        )


def check_evaluate(evaluate: Evaluate, source: str, origins: Mapping[Location, str]) -> None:
    """Every evaluation's name and options. Raises RecipeError with the nearest name for what is not known."""
    known = names("evaluations")
    for suite in evaluate.suites:
        if suite not in known:
            raise RecipeError(
                f"{source}: evaluate.suites: unknown evaluation {suite!r}; {did_you_mean(suite, known)}"
            )
    for suite in evaluate.__pydantic_extra__:
        if suite not in known:
            raise RecipeError(
                f"{source}: unknown key 'evaluate.{suite}'; {did_you_mean(suite, ['suites', *known])}"
            )
        options = evaluate.options(suite)
        validate(resolve("evaluations", suite).Config, options, source, ("evaluate", suite), origins)


def _distinct(source: str, what: str, values: Sequence[Any]) -> None:
    for value in values:
        if values.count(value) > 1:
            raise RecipeError(f"{source}: {what} {value!r} occurs twice; give each its own")


def _check_arm(recipe: Recipe, arm: Arm, index: int, source: str, origins: Mapping[Location, str]) -> None:
    here = f"{source}: arms.{index} ({arm.name})"
    if not arm.slug:
        raise RecipeError(f"{here}: the name needs at least one letter or digit")
    known = names("variants")
    begun = FROM in recipe.model
    if arm.retrofit is not None and not begun:
        raise RecipeError(f"{here}: retrofit needs a checkpoint to begin with: set model.from")
    if begun:
        _check_begun(recipe, arm, here)
    if arm.retrofit is not None and arm.retrofit.attention not in known:
        raise RecipeError(
            f"{here}: retrofit.attention: unknown attention {arm.retrofit.attention!r}; "
            f"{did_you_mean(arm.retrofit.attention, known)}"
        )
    if arm.attention not in known:
        raise RecipeError(
            f"{here}: unknown attention {arm.attention!r}; {did_you_mean(arm.attention, known)}"
        )
    for key in arm.train:
        if key in Train.model_fields and key not in ARM_TRAIN_KEYS:
            raise RecipeError(
                f"{here}: train.{key} is the same for all arms, set it in [train]; "
                f"an arm may set {', '.join(ARM_TRAIN_KEYS)}"
            )
    merged = {**recipe.train.model_dump(mode="json"), **arm.train}
    train = validate(Train, merged, source, ("arms", index, "train"), origins)
    if not begun and train.trainable != "everything":
        raise RecipeError(f"{here}: train.trainable = {train.trainable!r} needs model.from")
    if train.trainable == "new" and recipe.task in ("masked", "seq2seq"):
        raise RecipeError(
            f'{here}: train.trainable = "new": a checkpoint of task = "{recipe.task}" has all that the model has'
        )
    if train.trainable == "new" and arm.retrofit is None and recipe.task == "causal":
        raise RecipeError(f'{here}: train.trainable = "new" needs a retrofit: a plain model has nothing new')
    for table, keys in (("model", recipe.model), (f"arms.{index}.model", arm.model)):
        for key, reason in RESERVED_MODEL_KEYS.items():
            if key in keys:
                raise RecipeError(f"{source}: {table}.{key} cannot be set there: {reason}")
