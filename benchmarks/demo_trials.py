"""One arm of a recipe, trained in a bare loop, for quick looks at what makes retrieval come early.

    python benchmarks/demo_trials.py recipes/demo.toml --arm CoCA --tag NAME [--seed 0] [--stop 600000] [KEY=VALUE ...]

Rows, model, optimiser and loss are those of `clearhead compare`; there are no checkpoints and no logs. Every 102,400
tokens it prints retrieval of one fact at training length (64 held-out documents), exact match on bare facts, bits per
byte; at the end it adds one line to benchmarks/results/demo_trials.jsonl. `--stop` ends a trial early, `--hopeless`
ends one in which bare facts are below 0.01 after so many tokens. One seed proves nothing.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim.lr_scheduler import LambdaLR

from clearhead.data.needles import Split
from clearhead.data.packing import validation_windows
from clearhead.data.prepare import prepare
from clearhead.data.retrieval import pair_document
from clearhead.evals.asking.needle_documents import needle_probe
from clearhead.evals.asking.running import inference, to_batch, token_losses
from clearhead.runs.recipe_io import load_recipe
from clearhead.runs.rows import data_spec, needle_range, training_rows
from clearhead.train.optimiser import adamw, course
from clearhead.train.trainer import IGNORE, build_model

OUT = Path(__file__).parent / "results" / "demo_trials.jsonl"
EVERY = 102_400
PAIRS = 48


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
    given = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    job = load_recipe(Path(given.recipe), given.overrides).for_arm(given.arm, given.seed)
    data = prepare(data_spec(job))
    torch.manual_seed(job.seed)
    model = build_model(job, data)
    optimizer = adamw(model, job.train)
    schedule = LambdaLR(optimizer, course(job.train))
    rows = training_rows(job, data)
    per_step = job.train.batch_tokens // job.data.length
    every = max(1, given.every // job.train.batch_tokens)
    steps = job.train.steps
    if given.stop:
        steps = min(steps, given.stop // job.train.batch_tokens)
    history, mastered, seconds = [], None, 0.0
    sums = [0.0, 0.0]
    started = time.perf_counter()
    for step in range(1, steps + 1):
        batch = [rows[(step - 1) * per_step + i] for i in range(per_step)]
        tensors = {key: torch.from_numpy(np.stack([row[key] for row in batch])) for key in batch[0]}
        labels = torch.nn.functional.pad(tensors["labels"][:, 1:], (0, 1), value=IGNORE)
        logits = model(
            input_ids=tensors["input_ids"], position_ids=tensors["position_ids"], use_cache=False
        ).logits
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none"
        ).view_as(labels)
        loss = (losses.sum(1) / (labels != IGNORE).sum(1).clamp(min=1)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), job.train.grad_clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        sums[0] += float(loss.detach())
        sums[1] += 1
        if step % every == 0 or step == steps:
            seconds += time.perf_counter() - started
            found = measure(model, job, data)
            entry = {"tokens": step * job.train.batch_tokens, "loss": round(sums[0] / sums[1], 3), **found}
            sums = [0.0, 0.0]
            history.append(entry)
            if mastered is None and found["needles"] >= 0.9:
                mastered = entry["tokens"]
            print(
                given.tag,
                given.arm,
                given.seed,
                entry,
                f"{entry['tokens'] / seconds:.0f} tokens/s",
                flush=True,
            )
            if given.hopeless and entry["tokens"] >= given.hopeless and found["pairs"] < 0.01:
                break
            started = time.perf_counter()
    record = {
        "tag": given.tag,
        "recipe": given.recipe,
        "overrides": given.overrides,
        "arm": given.arm,
        "seed": given.seed,
        "tokens": history[-1]["tokens"],
        "mastered": mastered,
        "params": sum(p.numel() for p in model.parameters()),
        "history": history,
    }
    with OUT.open("a") as file:
        file.write(json.dumps(record) + "\n")


def measure(model: Any, job: Any, data: Any) -> dict[str, Any]:
    """Retrieval of one fact at training length, exact match on bare facts, bits per byte."""
    needles = needle_range(job)
    spec = needles.spec(job.data.length, 1, 1)
    single = needle_probe(model, data.validation, data.tokenizer, spec, samples=64)
    bare = {split: facts_right(model, job, data, split) for split in ("train", "validation")}
    with inference(model):
        windows = [
            ids
            for _, ids, _ in validation_windows(data.validation, job.data.length)
            if len(ids) == job.data.length
        ][:16]
        loss = float(token_losses(model, to_batch(windows, model.device)).mean())
    size = float(data.validation.utf8_bytes.sum()) / data.validation.num_tokens
    return {
        "needles": round(single, 3),
        "pairs": round(bare["validation"], 3),
        "pairs_seen": round(bare["train"], 3),
        "bits_per_byte": round(loss / math.log(2) / size, 3),
    }


def facts_right(model: Any, job: Any, data: Any, split: Split) -> float:
    """Exact match on facts without text, as many as training ever has; "train": made of keys that it learns from."""
    right, asked, most = 0, 0, job.data.needles.pairs[1]
    spec = needle_range(job).spec(job.data.length, most, most)
    with inference(model):
        for i in range(PAIRS):
            made = pair_document(spec, seed=7, index=i, split=split, tokenizer=data.tokenizer)
            ids = torch.from_numpy(made["input_ids"])
            guess = model(input_ids=ids[None], use_cache=False).logits[0].argmax(-1)
            labels = torch.from_numpy(made["labels"])
            hit = (guess[:-1] == labels[1:])[labels[1:] != IGNORE].view(-1, job.data.needles.value_tokens)
            right += int(hit.all(1).sum())
            asked += len(hit)
    return right / asked


if __name__ == "__main__":
    main()
