"""The comparison: check, prepare the data once, sweep if asked, train and evaluate every arm with every seed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clearhead.data.began import set_stamps
from clearhead.registry import did_you_mean, resolve
from clearhead.runs.directory import check_space, check_writable, keep_data, kept_data, open_run, set_aside
from clearhead.runs.lock import exclusive
from clearhead.runs.recipe import FROM, Arm, Evaluate, Recipe, RecipeError
from clearhead.train.model_table import model_fault, option_fault
from clearhead.train.pool import (
    WORKER,
    ProgressRow,
    TrainingTask,
    Watcher,
    is_trained,
    parallelism,
    run_tasks,
)

FLOAT_BYTES = 4
# Weights and two Adam moments in each checkpoint of a running job: two kept and the one being written; and what it
# began with, where that was a checkpoint.
NUMBERS_PER_PARAMETER = 3 * 3 + 1
# Logs, TensorBoard events and results of one job, and the tokenizer.
BYTES_PER_JOB = 10_000_000

Say = Callable[[str], None]


@dataclass(frozen=True)
class ComparisonOutcome:
    """What a comparison ended with; `failed` is empty when every job is complete."""

    rows: list[ProgressRow]

    @property
    def failed(self) -> list[ProgressRow]:
        return [row for row in self.rows if row.status.state != "evaluated"]


@dataclass(frozen=True)
class Grid:
    """What a run does instead of every arm with every seed.

    tasks(recipe, run_dir, rates) makes the tasks, rates being those of a sweep by arm, or None; `worker` is the module
    that runs one; parameters: what `bytes_needed` counts for an arm.
    """

    tasks: Callable[[Recipe, Path, Mapping[str, float] | None], list[TrainingTask]]
    worker: str
    parameters: Mapping[str, int]


def run_comparison(
    recipe: Recipe,
    run_dir: Path,
    *,
    watcher: Watcher,
    say: Say,
    fresh: bool = False,
    grid: Grid | None = None,
) -> ComparisonOutcome:
    """Bring the run directory to completion: whatever is finished there stays, everything else is run.

    fresh: set an existing run directory aside first and begin again.
    grid:  run its tasks in place of every arm with every seed.

    Raises RunError or RecipeError before anything is trained; a job that fails later is in the outcome.
    """
    from clearhead.train.begun import with_attention

    # A recipe that cannot be run leaves everything as it was.
    parameters = check_models(recipe) if grid is None else grid.parameters
    check_loggers(recipe)
    recipe = with_attention(recipe)
    make, worker = (arm_tasks, WORKER) if grid is None else (grid.tasks, grid.worker)
    if fresh:
        set_aside(run_dir, say)
    check_writable(run_dir)
    with exclusive(run_dir, f"the run {str(run_dir)!r}"):
        open_run(run_dir, recipe)
        tasks = make(recipe, run_dir, None)
        sweep = _sweep_tasks(recipe, run_dir)
        check_space(run_dir, bytes_needed([*sweep, *tasks], parameters))
        began = prepare_rows(recipe, run_dir, say)
        if sweep:
            say(f"choosing learning rates: {len(sweep)} runs")
            swept = ComparisonOutcome(run_tasks(sweep, watcher, began=began))
            if swept.failed:
                return swept
            from clearhead.train.sweep import choose

            rates = choose(recipe, sweep, run_dir)
            say("chosen: " + ", ".join(f"{arm} {rate:g}" for arm, rate in rates.items()))
            tasks = make(recipe, run_dir, rates)
        return ComparisonOutcome(run_tasks(tasks, watcher, worker=worker, began=began))


def prepare_rows(recipe: Recipe, run_dir: Path, say: Say) -> dict[str, Any]:
    """Make the corpus ready for all jobs and check the mixture of rows, before anything runs.

    Returns what the run began with, which every job is held to: the identity of its text, tokens and tokenizer and the
    fingerprints of its evaluation sets. Raises ValueError that names the file when the run began with something else,
    or the key when rows cannot be made.
    """
    from clearhead.data.prepare import prepare
    from clearhead.models.tasks import task_of
    from clearhead.runs.rows import check_validation, data_spec
    from clearhead.train.begun import describe_head

    before = kept_data(run_dir)
    data = prepare(data_spec(recipe), progress=say, began=before)
    job = recipe.for_arm(recipe.arms[0].name, recipe.seeds[0])
    if before is None:
        # A run that has begun is not refused for what it began with.
        check_validation(job, data)
    keep_data(run_dir, data.identity, evaluation_sets(recipe.evaluate) | _begun_with(recipe))
    task = task_of(job.task)
    task.check(job, data)
    say(task.describe(job, data))
    if (head := describe_head(recipe)) is not None:
        say(head)
    return kept_data(run_dir) or {}


def check_loggers(recipe: Recipe) -> None:
    """RecipeError for a name in `train.report_to` that Hugging Face's Trainer does not know or cannot use here."""
    asked = [name for name in recipe.train.report_to if name != "tensorboard"]
    if not asked:
        return
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    for name in asked:
        here = f"recipe {recipe.name!r}: train.report_to: "
        if name not in INTEGRATION_TO_CALLBACK:
            raise RecipeError(f"{here}no logger {name!r}; {did_you_mean(name, INTEGRATION_TO_CALLBACK)}")
        if name not in get_available_reporting_integrations():
            raise RecipeError(
                f"{here}the logger {name!r} is not installed here; pip install it, or leave it out"
            )


def evaluation_sets(evaluate: Evaluate) -> dict[str, str]:
    """The fingerprint of every file that the evaluations of a recipe read, by its path."""
    found: dict[str, str] = {}
    for suite in evaluate.suites:
        found |= set_stamps(evaluate.options(suite))
    return found


def _begun_with(recipe: Recipe) -> dict[str, str]:
    """The same of the files that training reads beside the corpus: instructions, examples and checkpoints."""
    from clearhead.train.begun import files_begun_with, files_read

    starts = (recipe.start_of(arm, seed) for seed in _all_seeds(recipe) for arm in recipe.arms)
    return files_read(recipe) | files_begun_with(recipe.task, starts)


def _all_seeds(recipe: Recipe) -> list[int]:
    """Those of the comparison, then those of the sweep."""
    return [*recipe.seeds, *(recipe.sweep.seeds if recipe.sweep is not None else [])]


def bytes_needed(tasks: Sequence[TrainingTask], parameters: Mapping[str, int]) -> int:
    """Disk that the unfinished tasks will take, from the parameters of each arm by name."""
    missing = [task for task in tasks if not is_trained(task.directory)]
    if not missing:
        return 0
    models = sum(FLOAT_BYTES * parameters[task.job.arm] + BYTES_PER_JOB for task in missing)
    largest = max(parameters[task.job.arm] for task in missing)
    return models + parallelism(missing)[0] * FLOAT_BYTES * NUMBERS_PER_PARAMETER * largest


def arm_tasks(recipe: Recipe, run_dir: Path, rates: Mapping[str, float] | None = None) -> list[TrainingTask]:
    """Every arm with every seed; all arms of a seed before the next seed, so that a part of a run can be compared."""
    tasks = []
    for seed in recipe.seeds:
        for arm in recipe.arms:
            job = recipe.for_arm(arm.name, seed, learning_rate=rates[arm.name] if rates else None)
            tasks.append(TrainingTask(job, job_directory(run_dir, arm.slug, seed), arm.name))
    return tasks


def job_directory(run_dir: Path, slug: str, seed: int) -> Path:
    """Where one arm with one seed lives."""
    return run_dir / "arms" / slug / f"seed-{seed}"


def _sweep_tasks(recipe: Recipe, run_dir: Path) -> list[TrainingTask]:
    if recipe.sweep is None:
        return []
    from clearhead.train.sweep import sweep_tasks

    return sweep_tasks(recipe, run_dir)


def _begun(recipe: Recipe, arm: Arm, here: str) -> int:
    """The parameters of an arm that begins with a checkpoint; RecipeError where one of its seeds cannot begin."""
    from clearhead.models.cost import parameters
    from clearhead.models.tasks import task_of
    from clearhead.train.begun import attention_of, config_of

    seeds = _all_seeds(recipe)
    if recipe.for_arm(arm.name, seeds[0]).train.trainable == "lora":
        from clearhead.train.lora import need_lora

        need_lora()
    models: list[tuple[dict[str, Any], int]] = []
    for seed in seeds if "{seed}" in str(recipe.model[FROM]) else seeds[:1]:
        try:
            config = config_of(recipe, arm, seed, thorough=True)
            models.append((attention_of(config), parameters(config, task_of(recipe.task).model_class)))
        except (ValueError, TypeError, ArithmeticError, RuntimeError, OSError) as error:
            raise RecipeError(f"{here}: {' '.join(str(error).split())}") from error
        if models[-1] != models[0]:
            raise RecipeError(
                f"{here}: its checkpoints are different models: {_told(models[0])} with seed {seeds[0]}, "
                f"{_told(models[-1])} with seed {seed}"
            )
    for key, value in models[0][0].items():
        if arm.retrofit is None and key in arm.model_fields_set and getattr(arm, key) != value:
            raise RecipeError(
                f"{here}: {key} {getattr(arm, key)!r} is not what its checkpoint has, {value!r}: leave it out, or "
                "begin with another checkpoint"
            )
    return models[0][1]


def _told(model: tuple[dict[str, Any], int]) -> str:
    """A model in a few words."""
    (attention, options), count = model[0].values(), model[1]
    return f"{attention} {options or ''}".strip() + f" of {count:,} parameters"


def check_models(recipe: Recipe) -> dict[str, int]:
    """Build every arm's model without memory, so that a wrong key or option is found before anything runs.

    Returns the parameters of each arm by name. Raises RecipeError that names the arm.
    """
    from huggingface_hub.errors import StrictDataclassError

    from clearhead.models.cost import parameters
    from clearhead.models.tasks import task_of

    task = task_of(recipe.task)
    also = task.also(recipe)
    counts = {}
    for index, arm in enumerate(recipe.arms):
        here = f"recipe {recipe.name!r}: arms.{index} ({arm.name})"
        if FROM in recipe.model:
            counts[arm.name] = _begun(recipe, arm, here)
            continue
        # Only its own keys: what its base class would take besides, and anything else, is a mistake in a recipe.
        for given in (recipe.model, arm.model):
            for where, table, known in task.tables(given):
                for key in table:
                    if key not in known:
                        raise RecipeError(f"{here}: unknown key '{where}.{key}'; {did_you_mean(key, known)}")
        fault = model_fault(recipe.model_of(arm)) or option_fault(
            resolve("variants", arm.attention), arm.attention_options
        )
        if fault is not None:
            raise RecipeError(f"{here}: {fault}")
        try:
            config = task.config(recipe.model_of(arm), recipe.tokenizer.vocab_size, **also)
            counts[arm.name] = parameters(config, task.model_class)
        except (ValueError, TypeError, ArithmeticError, RuntimeError, StrictDataclassError) as error:
            # The configuration's own check wraps what it found; the cause is the sentence.
            reason = error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error
            raise RecipeError(f"{here}: {' '.join(str(reason).split())}") from error
    return counts
