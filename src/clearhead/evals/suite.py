"""Which evaluations a model from elsewhere is put through, with what options and on what text: a TOML file.

```
[corpus]                 # as in a recipe, of which it is the text to evaluate on
source = "stdlib"
[evaluate]               # as in a recipe
suites = ["perplexity", "many_shot"]
[evaluate.many_shot]
sets = ["{sets}/intents.jsonl.gz"]
```

`{sets}` in an option stands for a directory that is named when the file is used; without one the evaluations that
need it are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clearhead.runs.recipe import Evaluate, RecipeError, RecipeTable
from clearhead.runs.recipe_io import check_evaluate, read_toml, validate

SETS = "{sets}"


class EvaluationText(RecipeTable):
    """The text to evaluate on; see `clearhead.data.corpora.open_corpus` for what a source can be."""

    source: str = "stdlib"
    text_field: str = "text"


class SuiteFile(RecipeTable):
    """The whole file."""

    description: str = ""
    corpus: EvaluationText = EvaluationText()
    evaluate: Evaluate = Evaluate(suites=[])


@dataclass(frozen=True)
class Suite:
    """A suite that can be run. left_out: evaluations that cannot, and why."""

    corpus: EvaluationText = field(default_factory=EvaluationText)
    evaluate: Evaluate = field(default_factory=lambda: Evaluate(suites=[]))
    left_out: dict[str, str] = field(default_factory=dict)


def load_suite(path: Path, sets: Path | None = None) -> Suite:
    """Read and check a suite; `{sets}` becomes `sets`.

    Raises RecipeError, one sentence that names the file and the key: an unknown evaluation, option or key with the
    nearest known one, a value of another type, or a directory of sets that is not there.
    """
    if sets is not None and not sets.is_dir():
        raise RecipeError(f"there is no directory {str(sets)!r} of sets")
    found = validate(SuiteFile, read_toml(path, "suite of evaluations"), str(path), (), {})
    check_evaluate(found.evaluate, str(path), {})
    if "suites" not in found.evaluate.model_fields_set or not found.evaluate.suites:
        raise RecipeError(f"{path}: evaluate.suites names no evaluation")
    options = {name: found.evaluate.options(name) for name in found.evaluate.suites}
    needy = [name for name in options if sets is None and _has(options[name])]
    filled = {
        name: given if sets is None else _filled(given, str(sets)) for name, given in options.items() if given
    }
    evaluate = Evaluate.model_validate({"suites": found.evaluate.suites, **filled})
    return Suite(found.corpus, evaluate, dict.fromkeys(needy, "name the directory of its data with --sets"))


def _has(value: Any) -> bool:
    return _filled(value, "") != value


def _filled(value: Any, sets: str) -> Any:
    if isinstance(value, str):
        return value.replace(SETS, sets)
    if isinstance(value, list):
        return [_filled(part, sets) for part in value]
    if isinstance(value, dict):
        return {key: _filled(part, sets) for key, part in value.items()}
    return value
