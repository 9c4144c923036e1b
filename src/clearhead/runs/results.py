"""Reading a run directory: what was asked, what was trained, what was measured, and what is missing.

Nothing here computes or writes. Files that do not exist yet read as empty; a file that exists and is broken is an
error that names it, except the last line of `metrics.jsonl`, which a killed process may have left half written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clearhead.runs.files import not_finite, read_lines, read_object
from clearhead.runs.recipe_io import read_toml

SKIPPED = "skipped"
"""The key of a result on disk that says why there is none."""


@dataclass(frozen=True)
class Skipped:
    """What was not measured, and why in a sentence; on disk `{"skipped": reason}`."""

    reason: str

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Skipped | None:
        """What the values of a result say of themselves; None where they are values."""
        return cls(str(values[SKIPPED])) if SKIPPED in values else None

    def values(self) -> dict[str, Any]:
        return {SKIPPED: self.reason}


@dataclass(frozen=True)
class SeedResults:
    """One trained model: its log, its results by evaluation (whole records), its cost and its state."""

    metrics: list[dict[str, Any]] = field(default_factory=list)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    status: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ArmResults:
    name: str
    slug: str
    attention: str
    seeds: dict[int, SeedResults] = field(default_factory=dict)

    def records(self, evaluation: str) -> dict[int, dict[str, Any]]:
        """The whole records of an evaluation by seed."""
        return {
            seed: run.results[evaluation] for seed, run in self.seeds.items() if evaluation in run.results
        }


@dataclass(frozen=True)
class RunResults:
    recipe: dict[str, Any]
    env: dict[str, Any]
    arms: list[ArmResults]

    @property
    def baseline(self) -> ArmResults:
        """The first arm of the recipe, against which the others are compared."""
        return self.arms[0]

    @property
    def name(self) -> str:
        return str(self.recipe.get("name", "run"))

    @property
    def training_length(self) -> int | None:
        length = self.recipe.get("data", {}).get("length")
        return None if length is None else int(length)

    def values(self, evaluation: str) -> dict[str, dict[int, dict[str, Any]]]:
        """Arm name -> seed -> values, in the recipe's order, arms without any result left out.

        Only what was measured with the same options can be compared: with the options that most records have. Others,
        left by an interrupted re-evaluation, count as missing, as do skipped ones.
        """
        options, sets = self._options(evaluation)
        found: dict[str, dict[int, dict[str, Any]]] = {}
        for arm in self.arms:
            for seed, record in arm.records(evaluation).items():
                if _same(record, options, sets) and Skipped.read(record["values"]) is None:
                    found.setdefault(arm.name, {})[seed] = record["values"]
        return found

    def skipped(self, evaluation: str) -> list[str]:
        """Why results are not there, one entry a reason, with the arms that it concerns."""
        options, sets = self._options(evaluation)
        reasons: dict[str, list[str]] = {}
        for arm in self.arms:
            for record in arm.records(evaluation).values():
                skipped = Skipped.read(record["values"])
                reason = None if skipped is None else skipped.reason
                if not _same(record, options, sets):
                    what = "options" if record.get("config") != options else "contents of its evaluation sets"
                    reason = f"measured with other {what} than the rest; clearhead evaluate measures it again"
                if reason is not None and arm.name not in reasons.setdefault(reason, []):
                    reasons[reason].append(arm.name)
        return [f"{', '.join(arms)}: {reason}" for reason, arms in reasons.items()]

    def _options(self, evaluation: str) -> tuple[dict[str, Any] | None, dict[str, str] | None]:
        """What most records of an evaluation were measured with, the first if it is a tie: options, stamps of sets."""
        records = [record for arm in self.arms for record in arm.records(evaluation).values()]
        options = _commonest([record.get("config") for record in records])
        return options, _commonest([r["sets"] for r in records if r.get("config") == options and "sets" in r])


def _commonest(found: list[Any]) -> Any:
    return max(found, key=found.count, default=None)


def _same(record: dict[str, Any], options: dict[str, Any] | None, sets: dict[str, str] | None) -> bool:
    """Whether a record was measured with these; one from before stamps were kept may be of any sets."""
    return record.get("config") == options and record.get("sets", sets) == sets


def slugify(name: str) -> str:
    """`DIFF V1` -> `diff-v1`: the directory name of an arm."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "arm"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or `{}` if the file does not exist. Raises ValueError that names a broken file."""
    return read_object(path) if path.exists() else {}


def read_result(path: Path) -> dict[str, Any]:
    """The record of an evaluation, or `{}` if there is none; one that holds NaN or infinities counts as skipped.

    Raises ValueError for a file that is not one of a result.
    """
    record = read_json(path)
    if not record:
        return {}
    if not isinstance(record.get("values"), dict):
        raise ValueError(f"{path} holds no values of an evaluation; delete it to have it made again")
    if (place := not_finite(record["values"])) is not None:
        reason = f"not all of it are numbers: {place}; clearhead evaluate measures it again"
        return {**record, "values": Skipped(reason).values(), "broken": True}
    return record


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, the last one for each step and kind: a resumed run repeats some steps."""
    records = {(int(record["step"]), "probe" in record): record for record in read_lines(path)}
    return [records[key] for key in sorted(records)]


def load_run(directory: str | Path) -> RunResults:
    """Everything on disk about a run. Raises FileNotFoundError when the directory is not one of a run."""
    root = Path(directory)
    recipe_file = root / "recipe.toml"
    if not recipe_file.exists():
        raise FileNotFoundError(f"{root} is not a run directory: it has no recipe.toml")
    recipe = read_toml(recipe_file)
    try:
        seeds = [int(seed) for seed in recipe.get("seeds", [0])]
        named = [
            (str(arm["name"]), str({**arm, **arm.get("retrofit", {})}.get("attention", "softmax")))
            for arm in recipe.get("arms", [])
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{recipe_file} is not the recipe of a run: its seeds or arms cannot be read ({error})"
        ) from error
    arms = []
    for name, attention in named:
        slug = slugify(name)
        runs = {seed: _load_seed(root / "arms" / slug / f"seed-{seed}") for seed in seeds}
        arms.append(ArmResults(name, slug, attention, runs))
    if not arms:
        raise ValueError(f"{recipe_file} names no arms")
    return RunResults(recipe, read_json(root / "env.json"), arms)


def _load_seed(job: Path) -> SeedResults:
    return SeedResults(
        metrics=read_metrics(job / "metrics.jsonl"),
        results={path.stem: read_result(path) for path in sorted((job / "results").glob("*.json"))},
        cost=read_json(job / "cost.json"),
        status=read_json(job / "status.json"),
    )
