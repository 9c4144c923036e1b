"""Models that begin with a checkpoint: opened, retrofitted, and told how far their training is.

Checkpoints of causal language models go through the converters, whatever library they are of. Those of encoders and
encoder-decoders are saved models of this library (`clearhead.models.tasks.begin`), and their attention stays.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from clearhead.data.began import check_sets, set_stamps
from clearhead.data.opening import open_pretrained
from clearhead.data.prepare import PreparedData
from clearhead.data.writing import writing
from clearhead.models.tasks import task_of
from clearhead.models.tasks.begin import begin, begun_config, find_folder, keeps_head, model_files, open_saved
from clearhead.runs.checksums import CHECKSUMS, check_model, seal, sync
from clearhead.runs.directory import kept_data
from clearhead.runs.files import read_object, write_json
from clearhead.runs.recipe import FROM, Arm, ArmRetrofit, Job, Recipe
from clearhead.variants.schedule import advance

START = "start"
NEW = "new.json"
"""In it: the names of the parameters that the checkpoint did not have."""


def begun_model(job: Job, job_dir: Path, data: PreparedData) -> PreTrainedModel:
    """The model that the job begins with, in float32: its checkpoint, with the arm's retrofit or the task's new head.

    It is written to `job_dir / "start"` once, in one step, so that a resumed job begins with the same weights. Raises
    ValueError, in a sentence, where the checkpoint or the tokenizer does not fit.
    """
    assert job.start is not None
    folder = job_dir / START
    with FileLock(job_dir / ".start.lock"):
        if not (folder / "config.json").exists():
            check_files(job_dir, files_begun_with(job.task, [job.start]))
            # What a training draws later does not depend on whether this was done before.
            with torch.random.fork_rng():
                if job.task == "causal":
                    _write(job, folder)
                else:
                    _write_saved(job, job_dir, folder)
    if job.task != "causal":
        check_model(folder)
    model: Any = open_pretrained(
        task_of(job.task).auto_class, folder, dtype=torch.float32, use_safetensors=True
    )
    vocabulary = len(data.tokenizer)
    if vocabulary > model.config.vocab_size:
        raise ValueError(
            f"tokenizer.source has {vocabulary} tokens, but {job.start!r} has {model.config.vocab_size} embeddings; "
            "give the checkpoint's own tokenizer"
        )
    return model


def new_parameters(job: Job, job_dir: Path) -> tuple[str, ...] | None:
    """Names of the parameters that the checkpoint of a job with `begun_model` did not have.

    None for a causal language model, where the attention itself tells what is new, and for a job that begins with none.
    """
    if job.start is None or job.task == "causal":
        return None
    return tuple(read_object(job_dir / START / NEW)["new"])


def forget_start(job_dir: Path) -> None:
    """Remove what a finished job does not need any more."""
    shutil.rmtree(job_dir / START, ignore_errors=True)
    (job_dir / ".start.lock").unlink(missing_ok=True)


def _write(job: Job, folder: Path) -> None:
    from clearhead.convert.retrofit import retrofit
    from clearhead.convert.run import convert

    assert job.start is not None
    if job.retrofit is None:
        convert(job.start, folder)
    else:
        retrofit(job.start, folder, _plan(job.retrofit, job.seed))


def _write_saved(job: Job, job_dir: Path, folder: Path) -> None:
    """The same of a saved model of this library."""
    assert job.start is not None
    task = task_of(job.task)
    part = job_dir / ".start.part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        model, new = begin(task, open_saved(job.start, task), job)
        # Where processes have met already, transformers lets the first one alone write; here it is who came first.
        model.should_save_on_this_rank = lambda is_main_process: is_main_process
        with writing(folder):
            model.save_pretrained(part)
            write_json(part / NEW, {"new": list(new)})
            # Behind the reading: what was read is then what is looked at.
            check_files(job_dir, files_begun_with(job.task, [job.start]))
            seal(part, CHECKSUMS)
            part.replace(folder)
            sync(job_dir)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _plan(asked: ArmRetrofit, seed: int) -> Any:
    from clearhead.convert.retrofit import RetrofitPlan

    layers = asked.layers if isinstance(asked.layers, str) else tuple(asked.layers)
    return RetrofitPlan(asked.attention, asked.init, layers, asked.options, asked.heads, seed=seed)


def config_of(recipe: Recipe, arm: Arm, seed: int, *, thorough: bool = False) -> Any:
    """The configuration that `arm` has with `seed`, without opening weights; ValueError where there is none.

    thorough: also whether a saved model of this library is as it was written, and has something new where that alone
        is to be trained.
    """
    named = recipe.start_of(arm, seed)
    assert named is not None
    if recipe.task != "causal":
        task = task_of(recipe.task)
        saved = open_saved(named, task)
        check_tokenizer(recipe, saved.folder, saved.config, named)
        if thorough:
            check_model(saved.folder)
            new = recipe.for_arm(arm.name, seed).train.trainable == "new"
            if new and keeps_head(task, saved, recipe):
                raise ValueError(f'train.trainable = "new": {named!r} has the head for these labels already')
        return begun_config(task, saved, recipe)
    # A path whose first directory is here is no name on a hub: it is said what is there instead.
    absent = Path(Path(named).parts[0]).exists() and not Path(named).exists()
    if "{arm}" in str(recipe.model[FROM]) and absent:
        find_folder(named)
    from clearhead.convert.retrofit import Retrofit
    from clearhead.convert.source import find_converter, open_source

    source = open_source(named)
    config = find_converter(source)[1].configuration(source)
    return config if arm.retrofit is None else Retrofit(_plan(arm.retrofit, seed)).outline(config)


def with_attention(recipe: Recipe) -> Recipe:
    """The recipe with each arm's attention and its options as its checkpoint has them, but for arms with a retrofit.

    So the run directory names what was trained. `check_models` has looked before at whatever an arm says of it.
    """
    if FROM not in recipe.model:
        return recipe
    found: dict[str | None, dict[str, Any]] = {}
    arms = []
    for arm in recipe.arms:
        named = recipe.start_of(arm, recipe.seeds[0])
        if arm.retrofit is None:
            if named not in found:
                found[named] = attention_of(config_of(recipe, arm, recipe.seeds[0]))
            arm = arm.model_copy(update=found[named])
        arms.append(arm)
    return recipe.model_copy(update={"arms": arms})


def attention_of(config: Any) -> dict[str, Any]:
    """A configuration's attention and its options, as an arm says them; of an encoder-decoder, its decoder's."""
    options = {key: value for key, value in (config.attention_options or {}).items() if value is not None}
    return {"attention": config.attention, "attention_options": options}


def describe_head(recipe: Recipe) -> str | None:
    """Which arms of a recipe have a new head, in a sentence; None for a task without labels and without model.from."""
    task = task_of(recipe.task)
    if FROM not in recipe.model or not task.decides:
        return None
    kept = []
    for arm in recipe.arms:
        named = recipe.start_of(arm, recipe.seeds[0])
        assert named is not None
        kept.append(keeps_head(task, open_saved(named, task), recipe))
    if all(kept):
        return "the checkpoints have these labels, so their heads are kept"
    names = [repr(arm.name) for arm, keeps in zip(recipe.arms, kept, strict=True) if keeps]
    but = f"; {', '.join(names)} had these labels and kept the head" if names else ""
    return f"the checkpoints have no head for these labels: a new one is drawn with each seed{but}"


def check_tokenizer(recipe: Recipe, folder: Path, config: Any, named: str) -> None:
    """ValueError unless `tokenizer.source` is the tokenizer that is saved with the checkpoint, if one is."""
    from clearhead.data.tokenizer import load_pretrained
    from clearhead.runs.rows import data_spec

    source, own = Path(recipe.tokenizer.source).expanduser() / "tokenizer.json", folder / "tokenizer.json"
    mask = data_spec(recipe).mask
    same = source.is_file() and own.is_file() and source.read_bytes() == own.read_bytes()
    if same and not mask:
        return
    given = load_pretrained(recipe.tokenizer.source, mask=mask)
    here = f"tokenizer.source {recipe.tokenizer.source!r}"
    if mask and given.mask_token_id >= config.vocab_size:
        raise ValueError(
            f'{named!r} has no mask token, with which task = "{recipe.task}" hides text; begin with one that has it'
        )
    if len(given) > config.vocab_size:
        raise ValueError(
            f"{here} has {len(given)} tokens, but {named!r} has {config.vocab_size} embeddings; give the checkpoint's "
            "own tokenizer"
        )
    if not same and own.is_file() and _tokens(given) != _tokens(load_pretrained(str(folder), mask=mask)):
        raise ValueError(
            f"{here} is not the tokenizer of {named!r}; give the checkpoint's own, {str(folder)!r}"
        )


def _tokens(tokenizer: Any) -> Any:
    """What decides which tokens a text becomes."""
    plain = json.loads(tokenizer.backend_tokenizer.to_str())
    return {key: value for key, value in plain.items() if key not in ("truncation", "padding")}


def files_read(source: Recipe | Job) -> dict[str, str]:
    """Path -> fingerprint of the files that training reads beside the corpus: instructions and examples."""
    return set_stamps({"data": source.data.instructions, "texts": source.data.examples.source})


def files_begun_with(task: str, starts: Iterable[str | None]) -> dict[str, str]:
    """The same of the checkpoints that trainings for `task` begin with."""
    from clearhead.convert.source import open_source
    from clearhead.data.cache import fingerprint

    named = dict.fromkeys(start for start in starts if start is not None)
    files = (
        file
        for name in named
        for file in (open_source(name).files if task == "causal" else model_files(find_folder(name)))
    )
    return {str(file): fingerprint(file) for file in files}


def check_files(job_dir: Path, now: Mapping[str, str]) -> None:
    """Raise CorpusError, naming the file, unless what was just read is what the run of this job began with."""
    check_sets((kept_data(job_dir) or {}).get("evaluation_sets", {}), now, "file")


class Schedules(TrainerCallback):
    """Tells the model's schedules, before every step, which one it is."""

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        advance(kwargs["model"], state.global_step + 1)
