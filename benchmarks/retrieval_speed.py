"""Seconds a scored sample of single-needle retrieval: `multi_needle` beside lm-evaluation-harness's niah_single_1.

    python benchmarks/retrieval_speed.py MODEL [--rounds 3] [--first 3 to go on] [--batch-sizes 1,8]
    python benchmarks/retrieval_speed.py --show

One model in memory, the same threads, rounds in turn. A round of ours is a fifth of a grid of 5 depths x 20 samples
at each length (one haystack, 4 samples a depth), prompts made and answers judged included; a round of the harness is
8 of its own prompts through its `generate_until`, in batches of each size, whose making and judging are not timed. Both
are asked in the form that begins the answer. The harness's prompts leave 128 tokens of a length free for the answer;
ours have the length that is named.

Both are counted by one rule: tokens read and written by the model, and the operations of its matrix products and of
causal attention; those over the rate of `torch.mm` are the least time that a sample could take.
Needs pip install 'clearhead[lm-eval]' wonderwords nltk.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from clearhead.bench.machine import facts, matrix_rate, versions
from clearhead.bench.measure import Call, interleaved, spread
from clearhead.bench.records import append
from clearhead.evals.retrieval.multi_needle.evaluation import MultiNeedle, MultiNeedleConfig
from clearhead.evals.subject import Subject
from clearhead.evals.subjects.external import ExternalLoader, ExternalSpec

OUT = Path(__file__).parent / "results" / "retrieval_speed.jsonl"
OURS = "clearhead"
LENGTHS = (256, 512, 1024, 1536, 2048)
SAMPLES = 4
"""Of a depth and round."""
GRID_SAMPLES = 20


@dataclass
class Count:
    """What a model was fed: tokens read, tokens written, steps that wrote them, operations; and how many were right."""

    read: int = 0
    written: int = 0
    steps: int = 0
    operations: float = 0.0
    samples: int = 0
    right: int = 0

    def a_sample(self) -> dict[str, float]:
        """Everything over the number of samples."""
        names = ("read", "written", "steps", "operations", "right")
        return {name: round(getattr(self, name) / self.samples, 4) for name in names}


class Counting:
    """Counts every forward pass of a model into ``count``; ``found`` has the last one of each program."""

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config()
        head = model.get_output_embeddings().weight
        matrices = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
        self.body = sum(w.numel() for w in matrices if w is not head)
        self.head = head.numel()
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.pair = 4 * config.num_attention_heads * width * config.num_hidden_layers
        self.found: dict[str, Count] = {}
        self.count = Count()
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: Any, arguments: Any, given: dict[str, Any]) -> None:
        ids, cache = given["input_ids"], given.get("past_key_values")
        (rows, new), before = ids.shape, cache.get_seq_length() if cache is not None else 0
        count = self.count
        if new > 1:
            count.read += rows * new
        else:
            count.written += rows
            count.steps += 1
        kept = given.get("logits_to_keep") or new
        pairs = new * before + new * (new + 1) / 2
        count.operations += rows * (2 * self.body * new + 2 * self.head * kept + self.pair * pairs)


def harness_requests(path: str, lengths: Sequence[int], most: int) -> dict[int, list[Any]]:
    """The harness's own requests of niah_single_1 by length."""
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    class Catches(LM):
        caught: list[Any]

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            self.caught = requests
            return [""] * len(requests)

        def loglikelihood(self, requests: Any) -> Any:
            raise NotImplementedError

        loglikelihood_rolling = loglikelihood

    found = {}
    for length in lengths:
        manager = TaskManager(metadata={"tokenizer": path, "max_seq_lengths": [length]})
        model = Catches()
        simple_evaluate(
            model=model, tasks=["niah_single_1"], limit=most, task_manager=manager, bootstrap_iters=0
        )
        found[length] = model.caught
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--first", type=int, default=0, help="number of the first round: its seed, its prompts"
    )
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--harness-lengths", default="512,1024,2048")
    parser.add_argument("--harness-samples", type=int, default=8, help="of a round and length")
    parser.add_argument("--batch-sizes", default="1,8", help="of the harness")
    parser.add_argument("--batch-tokens", type=int, default=4500, help="of ours")
    parser.add_argument("--show", action="store_true", help="only the committed results")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    if given.show or given.model is None:
        show(given.out)
        return
    lengths = [int(part) for part in given.lengths.split(",")]
    theirs = [int(part) for part in given.harness_lengths.split(",") if part]
    sizes = [int(part) for part in given.batch_sizes.split(",")]
    subject = ExternalLoader(ExternalSpec(given.model), print).subject
    with TemporaryDirectory() as folder:
        text = Path(folder, "topics.txt")
        text.write_text("\n\n".join(topics[name] for name in sorted(topics)), encoding="utf-8")
        tokenizer: Any = subject.tokenizer
        tokenizer.save_pretrained(Path(folder, "tokenizer"))
        most = given.harness_samples * (given.first + given.rounds)
        requests = harness_requests(str(Path(folder, "tokenizer")), theirs, most)
        for entry in measured(subject, text, lengths, requests, sizes, given):
            append(given.out, [entry])


def measured(
    subject: Subject,
    text: Path,
    lengths: Sequence[int],
    requests: dict[int, list[Any]],
    sizes: Sequence[int],
    given: Any,
) -> Iterator[dict[str, Any]]:
    """A line for each round and length."""
    from lm_eval.models.huggingface import HFLM

    model: Any = subject.model
    own = model.config._attn_implementation
    counting = Counting(model)
    harness: Any = HFLM(pretrained=model, tokenizer=subject.tokenizer, batch_size=1)

    def ours(length: int, number: int) -> None:
        counting.count = count = counting.found[OURS] = Count()
        config = MultiNeedleConfig(
            pairs=[], grid=(1, 1), lengths=[length], samples=SAMPLES, haystacks=1, form="completion",
            haystack=[str(text)], seed=5000 + number, batch_tokens=given.batch_tokens,
        )  # fmt: skip
        values = MultiNeedle().run(subject, config)
        count.samples = values["n"]
        count.right = sum(sum(cell["found"]) for cell in values["cells"])

    def theirs(part: Sequence[Any], size: int) -> None:
        counting.count = count = counting.found[f"harness, batches of {size}"] = Count()
        model.set_attn_implementation("sdpa")
        harness.batch_size_per_gpu = size
        said = harness.generate_until(list(part), disable_tqdm=True)
        model.set_attn_implementation(own)
        count.samples = len(part)
        pairs = zip(part, said, strict=True)
        count.right = sum(all(n in answer for n in request.doc["outputs"]) for request, answer in pairs)

    common = {
        "batch_tokens": given.batch_tokens,
        "model": Path(given.model).name,
        "machine": facts(),
        "versions": versions(),
        "date": date.today().isoformat(),
    }

    def line(name: str, seconds: float) -> dict[str, Any]:
        count = counting.found[name]
        return {"seconds": round(seconds / count.samples, 4), "samples": count.samples, **count.a_sample()}

    ours(256, 999)
    for number in range(given.first, given.first + given.rounds):
        for length in lengths:
            peers: dict[str, Call] = {OURS: partial(ours, length, number)}
            if length in requests:
                part = requests[length][number * given.harness_samples :][: given.harness_samples]
                for size in sizes:
                    peers[f"harness, batches of {size}"] = partial(theirs, part, size)
            if number % 2:
                peers = dict(reversed(peers.items()))
            rate = round(matrix_rate(torch.float32) / 1e9, 1)
            (seconds,) = interleaved(peers, 1)
            found = {name: line(name, seconds[name]) for name in peers}
            print(number, length, rate, found, flush=True)
            yield {"round": number, "length": length, "peers": found, "matrix_gflops": rate, **common}


def show(path: Path) -> None:
    """Means over all samples, the range of the ratios within a round, and the minutes of the grid."""
    lines = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    rate = 1e9 * spread([line["matrix_gflops"] for line in lines]).median
    grid = 0.0
    for length in sorted({line["length"] for line in lines}):
        rounds = [line["peers"] for line in lines if line["length"] == length]
        ours = mean([peers[OURS] for peers in rounds if OURS in peers], "seconds")
        grid += 5 * GRID_SAMPLES * ours
        for name in sorted({name for peers in rounds for name in peers}):
            found = [peers[name] for peers in rounds if name in peers]
            seconds, least = mean(found, "seconds"), mean(found, "operations") / rate
            told = f"{length}, {name}: {seconds:.2f} s a sample (torch.mm {least:.2f}), {seconds / ours:.2f} of ours"
            turns = [p[name]["seconds"] / p[OURS]["seconds"] for p in rounds if name in p and OURS in p]
            if turns and name != OURS:
                told += f", in one round {min(turns):.2f} to {max(turns):.2f}"
            each = f"{mean(found, 'read'):.0f} tokens read, {mean(found, 'written'):.1f} written"
            print(f"{told}; {each}; {sum(one['samples'] for one in found)} samples, {len(found)} rounds")
    print(f"the grid of {GRID_SAMPLES} samples a length and depth: {grid / 60:.1f} minutes")


def mean(found: Sequence[dict[str, float]], key: str) -> float:
    """Over samples, not over rounds."""
    return sum(one[key] * one["samples"] for one in found) / sum(one["samples"] for one in found)


if __name__ == "__main__":
    main()
