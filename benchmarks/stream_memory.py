"""Peak memory of tokenizing a large text and of reading its rows, each in a process of its own.

    python benchmarks/stream_memory.py 1 2 5 [--folder /tmp] [--tokenizer words] [--plain 0.2]   # gigabytes of text
    python benchmarks/stream_memory.py --show

The text is synthetic: words of random letters, drawn from 200,000 by a Zipf law, in documents of 2.5 kB on average
(log-normal), numbered; what follows the number repeats after 64 MB. Three fifths of it are one .jsonl file, the rest
forty .txt files; weights are 0.7 and 0.3. Rows have 1,024 tokens. What was written is removed at the end.

--tokenizer bpe: a byte-level BPE with 32,768 entries, trained on 64 MiB, as a recipe's is. words: a word is a token, a
third of the time, ids of four bytes. stand-in: every fifth byte is one, a twentieth of the time, ids of four bytes:
everything is as it is but for the tokenizer's library, whose own memory has to be seen with the others.

tokenize: from text to shards. read: all rows of an epoch, and the rows behind a drawn place once more in another
process ("same": they are equal to the bit). Peaks are the system's (`VmHWM`), mapped files and imports included;
"course" has the peak after that many megabytes of text, or thousands of rows. `anonymous` is the process's own at the
end. --plain G: also `corpus.source` without `tokenized`, which holds a table of all documents in memory, on G
gigabytes.
"""

import argparse
import hashlib
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np

from clearhead.bench.machine import facts, versions
from clearhead.bench.records import append

OUT = Path(__file__).parent / "results" / "stream_memory.jsonl"
WORDS, VOCABULARY, LENGTH = 200_000, 32_768, 1024
FILES, SHARE = 40, 0.6
CHECKED = 2_000
REPEATED = 64_000_000


def write_text(folder: Path, size: int) -> None:
    """`size` bytes of text below `folder`: web.jsonl and books/*.txt."""
    rng = np.random.default_rng(0)
    letters = np.frombuffer(b"etaoinshrdlcumwfgypbvkjxqz", dtype=np.uint8)
    chances = 1 / np.arange(3, 3 + len(letters))
    sizes = np.clip(rng.poisson(6.5, WORDS), 2, 20)
    drawn = rng.choice(letters, int(sizes.sum()), p=chances / chances.sum()).tobytes()
    ends = np.cumsum(sizes)
    words = [drawn[end - one : end].decode() for one, end in zip(sizes.tolist(), ends.tolist(), strict=True)]
    table = np.cumsum(1 / (np.arange(WORDS) + 2.7) ** 1.2)
    table /= table[-1]

    bodies, made = [], 0
    while made < min(size, REPEATED):
        count = max(5, int(rng.lognormal(5.55, 1.0)))
        bodies.append(" ".join(map(words.__getitem__, np.searchsorted(table, rng.random(count)).tolist())))
        made += len(bodies[-1])
    numbers = itertools.count()

    def document() -> str:
        number = next(numbers)
        return f"{number} {bodies[number % len(bodies)]}"

    write_words(folder / "words", words)
    written = 0
    with (folder / "web.jsonl").open("w") as file:
        while written < size * SHARE:
            text = document()
            file.write(f'{{"text": "{text}"}}\n')
            written += len(text)
    (folder / "books").mkdir()
    for number in range(FILES):
        written = 0
        with (folder / "books" / f"{number:02}.txt").open("w") as file:
            while written < size * (1 - SHARE) / FILES:
                text = document()
                file.write(text + "\n\n")
                written += len(text) + 2


def write_words(folder: Path, words: list[str]) -> None:
    """A tokenizer whose tokens are the words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    table = {word: number for number, word in enumerate(["<s>", "<unk>", *dict.fromkeys(words)])}
    tokenizer = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>").save_pretrained(
        folder
    )


def spec_of(folder: Path, plain: bool, tokenizer: str) -> Any:
    """What is prepared."""
    from clearhead.data.prepare import DataSpec
    from clearhead.data.spec import TextSource

    chosen = str(folder / "words") if tokenizer != "bpe" else tokenizer
    common: dict[str, Any] = {"tokenizer": chosen, "vocab_size": VOCABULARY, "validation_fraction": 0.005}
    if plain:
        return DataSpec(source=str(folder / "web.jsonl"), **common)
    web, books = str(folder / "web.jsonl"), str(folder / "books")
    return DataSpec(sources=(TextSource(web, 0.7), TextSource(books, 0.3)), **common)


def peak() -> float:
    """Megabytes of this process at its largest."""
    # Not ru_maxrss, which begins with what the process that started this one held.
    return round(int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024, 1)


def every_fifth_byte(tokenizer: Any, texts: list[str]) -> Any:
    """Stands in for `tokenizer.encode_texts`."""
    return [np.frombuffer(text.encode(), dtype=np.uint8)[::5] for text in texts]


def work(stage: str, folder: Path, begin: int, tokenizer: str) -> dict[str, Any]:
    """A stage in this process; what it found."""
    from clearhead.data import tokenizing
    from clearhead.data.packing import pack_text
    from clearhead.data.prepare import prepare

    course: list[tuple[float, float]] = [(0, peak())]
    write = vars(tokenizing)["write_shard"]

    def noted(*arguments: Any, **named: Any) -> Any:
        shard = write(*arguments, **named)
        course.append((round(course[-1][0] + (shard.text_bytes + shard.held_bytes) / 1e6, 1), peak()))
        print(course[-1], file=sys.stderr, flush=True)
        return shard

    vars(tokenizing)["write_shard"] = noted
    if tokenizer == "stand-in":
        vars(tokenizing)["encode_texts"] = every_fifth_byte
    data = prepare(
        spec_of(folder, stage == "plain", tokenizer), progress=lambda text: print(text, file=sys.stderr)
    )
    if stage != "read":
        return {"tokens": data.train.num_tokens, "documents": len(data.train), "course": course}
    rows = pack_text(data.train, LENGTH, 0, document_masks=True)
    count = len(rows)
    digest = hashlib.sha256()
    # An epoch of the sources together: by the weights one of them is read more often, the other less.
    for index in range(max(0, begin), begin + CHECKED if begin >= 0 else max(count, count // 2 + CHECKED)):
        row = rows[index]
        if index % (count // 10) == 0:
            course.append((round(index / 1e3), peak()))
            print(course[-1], file=sys.stderr, flush=True)
        if begin >= 0 or count // 2 <= index < count // 2 + CHECKED:
            digest.update(
                row["input_ids"].tobytes() + row["position_ids"].tobytes() + row["labels"].tobytes()
            )
    return {"rows": count, "digest": digest.hexdigest(), "middle": count // 2, "course": course}


def run_stage(stage: str, folder: Path, tokenizer: str, begin: int = -1) -> dict[str, Any]:
    """A stage in a process of its own, with its peak and its processor time."""
    print(f"{folder.name}: {stage}", file=sys.stderr)
    before = time.monotonic()
    command = [sys.executable, __file__, "--stage", stage, "--folder", str(folder), "--begin", str(begin)]
    command += ["--tokenizer", tokenizer]
    environment = {**os.environ, "CLEARHEAD_CACHE": str(folder / "cache"), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {"stage": stage, **found, "wall_seconds": round(time.monotonic() - before, 1)}


def child(stage: str, folder: Path, begin: int, tokenizer: str) -> None:
    """Work, then say in a line of JSON what it took."""
    found = work(stage, folder, begin, tokenizer)
    used = resource.getrusage(resource.RUSAGE_SELF)
    status = Path("/proc/self/status").read_text()
    anonymous = int(status.partition("RssAnon:")[2].split()[0]) / 1024
    peaks = {"peak_mb": peak(), "anonymous_mb": round(anonymous, 1)}
    print(json.dumps({**found, **peaks, "cpu_seconds": round(used.ru_utime + used.ru_stime, 1)}))


def measure(gigabytes: float, where: str, tokenizer: str, plain: bool) -> None:
    """All stages on a text of that size, written and removed; a line of results."""
    folder = Path(mkdtemp(prefix="stream_memory-", dir=where))
    try:
        write_text(folder, int(gigabytes * 1e9))
        text = sum(path.stat().st_size for path in (folder / "web.jsonl", *(folder / "books").iterdir()))
        if plain:
            stages = [run_stage("plain", folder, tokenizer)]
        else:
            stages = [run_stage("tokenize", folder, tokenizer), run_stage("read", folder, tokenizer)]
            again = run_stage("read", folder, tokenizer, stages[1]["middle"])
            stages[1]["same"] = again["digest"] == stages[1]["digest"]
            stages[1]["resumed_peak_mb"] = again["peak_mb"]
        record = {
            "case": {"gigabytes": gigabytes, "text_bytes": text, "length": LENGTH, "tokenizer": tokenizer},
            "stages": stages,
        }
        append(
            OUT, [{**record, "date": date.today().isoformat(), "machine": facts(), "versions": versions()}]
        )
        show(record)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def show(record: dict[str, Any]) -> None:
    """A line a stage."""
    for one in record["stages"]:
        kept = {
            key: value for key, value in one.items() if key not in ("digest", "stage", "middle", "course")
        }
        print(
            f"{record['case']['text_bytes'] / 1e9:.2f} GB  {one['stage']:9}",
            *(f"{k} {v}" for k, v in kept.items()),
        )


def main() -> None:
    """Measure, show, or be one of the processes that are measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("gigabytes", type=float, nargs="*")
    parser.add_argument("--folder", default="/tmp")
    parser.add_argument("--tokenizer", choices=("bpe", "words", "stand-in"), default="bpe")
    parser.add_argument("--plain", type=float, default=0.0)
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--stage", choices=("tokenize", "read", "plain"), help=argparse.SUPPRESS)
    parser.add_argument("--begin", type=int, default=-1, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.stage:
        child(asked.stage, Path(asked.folder), asked.begin, asked.tokenizer)
    elif asked.show:
        for line in OUT.read_text().splitlines():
            show(json.loads(line))
    else:
        for gigabytes in asked.gigabytes:
            measure(gigabytes, asked.folder, asked.tokenizer, plain=False)
        if asked.plain:
            measure(asked.plain, asked.folder, asked.tokenizer, plain=True)


if __name__ == "__main__":
    main()
