"""One arm of a recipe, trained in a bare loop, for quick looks at what makes retrieval come early.

    python benchmarks/demo_trials.py recipes/demo.toml --arm CoCA --tag NAME [--seed 0] [--stop 600000] [KEY=VALUE ...]

Rows, model, optimiser and loss are those of `clearhead compare`; there are no checkpoints and no logs. Every 102,400
tokens it prints retrieval of one fact at training length (64 held-out documents), exact match on bare facts, bits per
byte; at the end, and where it is interrupted, it adds one line to benchmarks/results/demo_trials.jsonl. `--stop` ends a
trial early, `--hopeless` one in which bare facts are below 0.01 after so many tokens. One seed proves nothing.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from clearhead.data.needles import Split
from clearhead.data.packing import IGNORED, validation_windows
from clearhead.data.prepare import PreparedData, prepare
from clearhead.data.retrieval import pair_document
from clearhead.evals.asking.needle_documents import needle_probe
from clearhead.evals.asking.running import inference, to_batch, token_losses
from clearhead.models.tasks import collate, mean_by_row, task_of
from clearhead.runs.recipe import Job
from clearhead.runs.recipe_io import load_recipe
from clearhead.runs.rows import data_spec, needle_range
from clearhead.train.optimiser import adamw, course

OUT = Path(__file__).parent / "results" / "demo_trials.jsonl"
EVERY = 102_400
PAIRS = 48
HOPELESS, MASTERED = 0.01, 0.9


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--arm", required=True)
    parser.add_argument("--tag", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop", type=int)
    parser.add_argument("--hopeless", type=int)
    parser.add_argument("--every", type=int, default=EVERY)
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    job = load_recipe(Path(given.recipe), given.overrides).for_arm(given.arm, given.seed)
    history: list[dict[str, Any]] = []
    started, stopped = time.perf_counter(), True
    try:
        for found in course_of(job, prepare(data_spec(job)), given.stop, given.every):
            history.append(found)
            rate = found["tokens"] / (time.perf_counter() - started)
            print(given.tag, given.arm, given.seed, found, f"{rate:.0f} tokens/s", flush=True)
            if given.hopeless and found["tokens"] >= given.hopeless and found["pairs"] < HOPELESS:
                break
        stopped = False
    finally:
        if history:
            record = {key: getattr(given, key) for key in ("tag", "recipe", "overrides", "arm", "seed")}
            record["tokens"] = history[-1]["tokens"]
            record["mastered"] = next((f["tokens"] for f in history if f["needles"] >= MASTERED), None)
            if stopped:
                record["stopped"] = True
            with given.out.open("a") as file:
                file.write(json.dumps({**record, "history": history}) + "\n")


def course_of(job: Job, data: PreparedData, stop: int | None, every: int) -> Iterator[dict[str, Any]]:
    """Train the job; what is measured after every so many tokens, and at the end."""
    task = task_of(job.task)
    torch.manual_seed(job.seed)
    model = task.untrained(job, data)
    optimizer = adamw(model, job.train)
    schedule = LambdaLR(optimizer, course(job.train))
    rows = task.rows(job, data)
    per_step = job.train.batch_tokens // job.data.length
    period = max(1, every // job.train.batch_tokens)
    steps = min(job.train.steps, (stop or job.train.tokens) // job.train.batch_tokens)
    total, count = 0.0, 0
    for step in range(1, steps + 1):
        batch = collate([rows[(step - 1) * per_step + i] for i in range(per_step)])
        labels = batch.pop("labels")
        loss = mean_by_row(*task.losses(model(**batch, **task.forward).logits, labels))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), job.train.grad_clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        total, count = total + float(loss.detach()), count + 1
        if step % period == 0 or step == steps:
            yield {
                "tokens": step * job.train.batch_tokens,
                "loss": round(total / count, 3),
                **measure(model, job, data),
            }
            total, count = 0.0, 0


def measure(model: Any, job: Job, data: PreparedData) -> dict[str, Any]:
    """Retrieval of one fact at training length, exact match on bare facts, bits per byte."""
    spec = needle_range(job).spec(job.data.length, 1, 1)
    single = needle_probe(model, data.validation, data.tokenizer, spec, samples=64)
    windows = [
        ids
        for _, ids, _ in validation_windows(data.validation, job.data.length)
        if len(ids) == job.data.length
    ][:16]
    with inference(model):
        loss = float(token_losses(model, to_batch(windows, model.device)).mean())
    size = float(data.validation.utf8_bytes.sum()) / data.validation.num_tokens
    return {
        "needles": round(single, 3),
        "pairs": round(facts_right(model, job, data, "validation"), 3),
        "pairs_seen": round(facts_right(model, job, data, "train"), 3),
        "bits_per_byte": round(loss / math.log(2) / size, 3),
    }


def facts_right(model: Any, job: Job, data: PreparedData, split: Split) -> float:
    """Exact match on facts without text, as many as training ever has; "train": made of keys that it learns from."""
    right, asked, most = 0, 0, job.data.needles.pairs[1]
    spec = needle_range(job).spec(job.data.length, most, most)
    with inference(model):
        for i in range(PAIRS):
            made = pair_document(spec, seed=7, index=i, split=split, tokenizer=data.tokenizer)
            ids = torch.from_numpy(made["input_ids"])
            guess = model(input_ids=ids[None], use_cache=False).logits[0].argmax(-1)
            labels = torch.from_numpy(made["labels"])
            hit = (guess[:-1] == labels[1:])[labels[1:] != IGNORED].view(-1, job.data.needles.value_tokens)
            right += int(hit.all(1).sum())
            asked += len(hit)
    return right / asked


if __name__ == "__main__":
    main()
