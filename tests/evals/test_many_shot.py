"""Many-shot learning: labels as an oracle decides them from scratch, whatever is shared, batched or interrupted."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from clearhead.data.tokenizer import train_bpe, wrap
from clearhead.evals.asking.records import RecordError
from clearhead.evals.in_context.labelled import Example
from clearhead.evals.in_context.many_shot.evaluation import ManyShot, ManyShotConfig, numbers
from clearhead.evals.in_context.prompts import LabelTrie, Wording, encode, make_prompts, make_trie
from clearhead.evals.in_context.scoring import LogitReader, Score, decide, likelihoods
from clearhead.runs.results import ArmResults, RunResults, SeedResults
from tests.evals import tiny
from tests.evals.test_many_shot_data import write
from tests.evals.test_multineedle import MAKERS

LABELS = [
    "human",
    "human being",
    "human group",
    "humble",
    "yes",
    "Date.",
    "location city of the north",
    "noon",
]
FORM = Wording("Question: {text}", "Type: {label}")
TEXTS = ["who is it?", "where does the slow brown river end, and why", "when", "what is a mill? 42"]
SEEN = [Example(text, label) for text, label in zip(TEXTS, LABELS[:1] + LABELS[3:6], strict=True)]


def words() -> PreTrainedTokenizerFast:
    """Knows " human", " yes", and the full stop with the end of the line, as single tokens."""
    text = "Question: who is it?\nType: human\n==\nQuestion: what is a mill?\nType: yes\n==\n"
    made = wrap(train_bpe([text] * 4, 340))
    assert len(encode(made, " yes")) == 1
    return made


def joining() -> PreTrainedTokenizerFast:
    """A full stop and the end of the line that follows are one token, as to many tokenizers."""
    alphabet = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary = {**alphabet, **{t: 256 + i for i, t in enumerate((".Ċ", "<pad>", "<bos>", "<eos>"))}}
    made = Tokenizer(models.BPE(vocabulary, [(".", "Ċ")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


def path_of(tokenizer: PreTrainedTokenizerFast, prompt: str, label: str) -> list[int]:
    """The tokens after the prompt, up to the one with which the line of the label is over: by decoding them."""
    start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    ids = tokenizer(f"{prompt} {label}\n==\n", add_special_tokens=False)["input_ids"]
    return next(
        ids[start:end]
        for end in range(start, len(ids) + 1)
        if tokenizer.decode(ids[start:end]).startswith(f" {label}\n")
    )


def logprobs(model: Any, ids: Sequence[int], **settings: Any) -> torch.Tensor:
    with torch.inference_mode():
        return (
            model(input_ids=torch.tensor([list(ids)]), use_cache=False, **settings).logits[0].log_softmax(-1)
        )


def oracle(
    model: Any, tokenizer: PreTrainedTokenizerFast, prompt: str, labels: Sequence[str], **settings: Any
) -> tuple[str, list[float]]:
    """The greedy label and all log-likelihoods, one whole row at a time, without cache, padding or tree."""
    start = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    paths = [path_of(tokenizer, prompt, label) for label in labels]
    scores = []
    for path in paths:
        nats = logprobs(model, [*start, *path], **settings)
        scores.append(sum(float(nats[len(start) + k - 1, token]) for k, token in enumerate(path)))
    said: list[int] = []
    while True:
        left = [i for i, path in enumerate(paths) if path[: len(said)] == said]
        if len(left) == 1:
            return labels[left[0]], scores
        nats = logprobs(model, [*start, *said], **settings)[-1]
        said.append(max({paths[i][len(said)] for i in left}, key=lambda token: float(nats[token])))


def prompts_of(tokenizer: PreTrainedTokenizerFast, labels: Sequence[str] = LABELS) -> Any:
    trie, tails = make_trie(tokenizer, FORM, labels, TEXTS)
    context, prompts = make_prompts(tokenizer, FORM, SEEN, TEXTS, tails)
    text = "<|bos|>" if tokenizer.bos_token == "<|bos|>" else "<bos>"
    for example in SEEN:
        text += f"Question: {example.text}\nType: {example.label}\n==\n"
    return trie, context, prompts, [f"{text}Question: {asked}\nType:" for asked in TEXTS]


@pytest.mark.parametrize("make", [words, joining])
def test_prompts_are_the_published_text_and_paths_end_with_the_line(make: Any) -> None:
    tokenizer = make()
    trie, context, prompts, texts = prompts_of(tokenizer)
    assert [tokenizer.decode(ids) for ids in prompts] == texts
    assert texts[0].startswith(tokenizer.decode(context)) and texts[0].endswith("\nType:")
    for text in texts:
        assert [list(path) for path in trie.paths] == [path_of(tokenizer, text, label) for label in LABELS]
    date = trie.paths[LABELS.index("Date.")]
    assert tokenizer.decode(list(date)) == " Date.\n"
    if make is joining:
        assert tokenizer.decode([date[-1]]) == ".\n"
    # Told by where labels part: nothing is decided by " human" alone, and nothing more is asked once one is left.
    human = trie.paths[0][:-1]
    assert trie.decided(human) is None and trie.decided(trie.paths[0]) == 0
    assert {trie.labels[i] for i in trie.below[human]} == {"human", "human being", "human group"}


def test_labels_that_a_tokenizer_cannot_tell_apart_or_joins_to_the_prompt_are_refused() -> None:
    with pytest.raises(ValueError, match="gives the labels 'a' and 'b' the same tokens"):
        LabelTrie.of(["a", "b"], [(1, 2), (1, 2)])
    glued = Wording("Question: {text}", "Type={label}")
    made = Tokenizer(
        models.BPE(
            {"=": 0, "y": 1, "=y": 2, **{c: 3 + i for i, c in enumerate("Ċ=TypeQusin:oĠwh")}}, [("=", "y")]
        )
    )
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    with pytest.raises(ValueError, match=r"joins the end of the prompt .* with the label 'y'"):
        make_trie(PreTrainedTokenizerFast(tokenizer_object=made), glued, ["y", "w"], ["who"])


@pytest.mark.parametrize("name", ["llama", "differential", "collinear", "window", "dynamic"])
def test_labels_are_those_of_an_unbatched_oracle(name: str) -> None:
    tokenizer = words()
    model = MAKERS[name]().double()
    trie, context, prompts, texts = prompts_of(tokenizer)
    length = max(map(len, prompts)) + trie.longest
    settled = {"rope_length": length} if name == "dynamic" else {}
    expected = [oracle(model, tokenizer, text, LABELS, **settled) for text in texts]
    wanted = torch.tensor([scores for _, scores in expected], dtype=torch.float64)
    for common, batch_tokens, side in (
        (None, 1, "right"),
        (context, 1, "left"),
        (context, 9000, "right"),
        (None, 9000, "left"),
    ):
        tokenizer.padding_side = side
        with torch.inference_mode():
            reader = LogitReader(model, prompts, common, batch_tokens=batch_tokens, length=length)
            assert (reader.kept is not None) == (common is not None and name not in ("window", "dynamic"))
            found = likelihoods(reader, prompts, trie)
            assert float((found - wanted).abs().max()) < 1e-10
            said = {score: dict(decide(reader, prompts, trie, score)) for score in ("greedy", "likelihood")}  # type: ignore[arg-type]
        assert [trie.labels[said["greedy"][i]] for i in range(4)] == [label for label, _ in expected]
        assert [said["likelihood"][i] for i in range(4)] == wanted.argmax(1).tolist()


class Speller(tiny.CopyModel):
    """Gives every token of ``wanted`` in turn after the prompt's last line, and counts its passes and tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, reply: Any) -> None:
        super().__init__(tiny.CopyConfig(vocab_size=400))
        self.words, self.reply = tokenizer, reply
        self.fed = 0

    def forward(self, input_ids: torch.Tensor, **settings: Any) -> Any:  # type: ignore[override]
        self.fed += input_ids.numel()
        kept = settings.get("logits_to_keep", 0)
        out = super().forward(input_ids, **settings)
        read = input_ids
        cache = settings.get("past_key_values")
        if cache is not None:
            read = cache.layers[0].keys[:, 0, :, 0].long()
        shift = read.shape[1] - input_ids.shape[1]
        for row in range(len(input_ids)):
            for k in range(max(0, input_ids.shape[1] - kept), input_ids.shape[1]):
                out.logits[row, k] = 0.0
                out.logits[row, k, self._next(read[row, : shift + k + 1].tolist())] = 9.0
        out.logits = out.logits[:, -kept:]
        return out

    def _next(self, ids: list[int]) -> int:
        text = self.words.decode(ids)
        start = text.rfind("\nType:")
        if start < 0 or "\n" in (spoken := text[start + 6 :]):
            return 0
        said = encode(self.words, f" {self.reply(text[: start + 6])}\n").tolist()
        return next((token for k, token in enumerate(said) if self.words.decode(said[:k]) == spoken), 0)


@pytest.mark.parametrize("reply", ["yes", "human", "human group", "location city of the north"])
@pytest.mark.parametrize("score", ["greedy", "likelihood"])
def test_no_more_passes_than_labels_need(reply: str, score: Score) -> None:
    tokenizer = words()
    model = Speller(tokenizer, lambda prompt: reply).eval()
    trie, _, prompts, texts = prompts_of(tokenizer)
    with torch.inference_mode():
        said = dict(decide(LogitReader(model, prompts[:1]), prompts[:1], trie, score))
    assert [trie.labels[label] for label in said.values()] == [reply]
    paths = [path_of(tokenizer, texts[0], label) for label in LABELS]
    own = path_of(tokenizer, texts[0], reply)
    # A pass wherever the labels that are left go on with different tokens.
    forks = sum(len({path[k] for path in paths if path[:k] == own[:k]}) > 1 for k in range(len(own)))
    assert forks == {"yes": 1, "human": 2, "human group": 3}.get(reply, forks)
    # Likelihoods take one pass of all labels' rows, and another one for those that are much longer.
    assert model.calls == (forks if score == "greedy" else 2)


def reader_of_labels(prompt: str) -> str:
    """Says the label that the number in the question has in the demonstrations, else a wrong one."""
    asked = int(re.findall(r"number (\d+)", prompt)[-1])
    for number, label in re.findall(r"number (\d+)[^\n]*\nType: ([^\n]+)\n", prompt):
        if int(number) % 3 == asked % 3:
            return str(label)
    return "human being"


NAMES = ["human", "human being", "yes"]
QUESTIONS = [(f"what is number {n}, " + "so " * (n % 5), NAMES[n % 3]) for n in range(60)]
SMALL: dict[str, Any] = {
    "items": 20, "draws": 2, "length": 400, "text_template": "Question: {text}", "label_template": "Type: {label}",
}  # fmt: skip


def subject_of(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path | None = None) -> Any:
    return replace(tiny.subject(model, tokenizer=tokenizer, training_length=400), folder=folder)


def run(tmp_path: Path, model: Any = None, folder: Path | None = None, **settings: Any) -> dict[str, Any]:
    tokenizer = words()
    settings.setdefault("sets", [write(tmp_path / "q.jsonl", QUESTIONS)])
    model = Speller(tokenizer, reader_of_labels).eval() if model is None else model
    return ManyShot().run(subject_of(model, tokenizer, folder), ManyShotConfig(**{**SMALL, **settings}))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()][1:]


def test_a_model_that_reads_learns_as_soon_as_its_label_was_shown(tmp_path: Path) -> None:
    values = run(tmp_path, folder=tmp_path)
    (one,) = values["sets"]
    points = {point["shots"]: point for point in one["points"]}
    assert (one["labels"], one["pool"], one["asked"], one["majority"]) == (3, 40, 20, 0.35)
    # From three demonstrations on every label is there; with fewer only texts of a shown label can be right.
    full = max(points)
    assert list(points) == [1, 2, 4, 8, full] and points[full]["full"] and not values["left_out"]
    assert [set(points[k]["correct"]) for k in (4, 8, full)] == [{"1"}] * 3
    assert set(points[1]["correct"]) == {"0", "1"} and all(p["n"] == 20 for p in one["points"])
    # Full: one more demonstration would not fit.
    assert points[full]["tokens"] <= 400 and values["n"] == 100
    over = run(tmp_path, shots=[full, full + 1])
    assert list(over["left_out"]) == [f"q, {full + 1} demonstrations"]
    assert "more than length 400" in next(iter(over["left_out"].values()))
    rows = lines(tmp_path / "many_shot.jsonl")
    contexts = {(r["shots"], r["draw"]): r["demonstrations"] for r in rows if r["index"] == -1}
    assert len(contexts) == 10 and len(rows) == 110
    texts = {" ".join(text.split()): label for text, label in QUESTIONS}
    for row in rows:
        if row["index"] == -1:
            continue
        context, asked = contexts[row["shots"], row["draw"]], row["asked"]
        assert context.count("\n==\n") == row["shots"] and asked.endswith("\nType:")
        text = asked.removeprefix("Question: ").removesuffix("\nType:")
        assert f"Question: {text}\n" not in context and texts[text] == row["label"]
        assert (
            (row["answer"] == row["label"])
            == row["right"]
            == (reader_of_labels(context + asked) == row["label"])
        )
        assert contexts[full, row["draw"]].startswith(context), (
            "fewer demonstrations are the beginning of more"
        )


def test_what_prompts_share_is_read_once(tmp_path: Path) -> None:
    shared, alone = (Speller(words(), reader_of_labels).eval() for _ in range(2))
    values = run(tmp_path, shared)
    assert run(tmp_path, alone, share_prefix=False, batch_tokens=1)["sets"] == values["sets"]
    assert shared.fed < 0.5 * alone.fed


@pytest.mark.parametrize("name", ["llama", "collinear", "window", "dynamic", "theirs dynamic"])
@pytest.mark.parametrize("score", ["greedy", "likelihood"])
def test_sharing_and_batches_change_no_answer(name: str, score: Score, tmp_path: Path) -> None:
    model = MAKERS[name]().double()
    settings: dict[str, Any] = {"score": score, "items": 6, "shots": [1, 5]}
    found = [
        run(tmp_path, model, **settings, **more)["sets"]
        for more in ({"share_prefix": False, "batch_tokens": 1}, {"batch_tokens": 1}, {"batch_tokens": 3000})
    ]
    assert found[0] == found[1] == found[2]
    # Nor does what else is measured.
    alone = run(tmp_path, model, **{**settings, "shots": [1]})["sets"][0]
    assert alone["points"][0]["correct"] == found[0][0]["points"][0]["correct"]


def test_an_interrupted_evaluation_goes_on(tmp_path: Path) -> None:
    whole = run(tmp_path, batch_tokens=1)

    def stops_after(count: int) -> Speller:
        seen: set[str] = set()

        def reply(prompt: str) -> str:
            seen.add(prompt)
            if len(seen) > count:
                raise KeyboardInterrupt
            return reader_of_labels(prompt)

        return Speller(words(), reply).eval()

    part = tmp_path / "many_shot.partial.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stops_after(30), tmp_path, batch_tokens=1)
    done = sum(row["index"] >= 0 for row in lines(part))
    assert 0 < done <= 30
    part.write_text(part.read_text()[:-20])
    model = stops_after(101 - done)
    assert run(tmp_path, model, tmp_path, batch_tokens=1) == whole and not part.exists()
    assert sum(row["index"] >= 0 for row in lines(tmp_path / "many_shot.jsonl")) == 100


def test_what_cannot_be_measured_is_left_out_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = run(tmp_path, shots=[1, 41])
    assert values["left_out"] == {"q, 41 demonstrations": "the set has 40 texts to demonstrate with"}
    assert "not one demonstration" in run(tmp_path, length=30)["skipped"]
    assert "more than the model takes" in run(tmp_path, tiny.gpt2(400), shots=[1, "full"])["skipped"]

    def offline(*unused: Any, **options: Any) -> Any:
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", offline)
    values = run(tmp_path, sets=["trec", str(tmp_path / "q.jsonl")], shots=[1])
    assert len(values["sets"]) == 1 and "cannot be opened (no network)" in values["left_out"]["trec"]
    assert "cannot be opened" in run(tmp_path, sets=["trec"])["skipped"]
    with pytest.raises(RecordError, match="items is 58"):
        run(tmp_path, items=58)
    with pytest.raises(RecordError, match="two sets are called 'q'"):
        (tmp_path / "more").mkdir()
        run(tmp_path, sets=[str(tmp_path / "q.jsonl"), write(tmp_path / "more" / "q.jsonl", QUESTIONS)])


def test_options_that_cannot_be_are_errors() -> None:
    with pytest.raises(ValidationError, match="ends with"):
        ManyShotConfig(label_template="{label}.")
    with pytest.raises(ValidationError, match="holds"):
        ManyShotConfig(text_template="Text:")
    with pytest.raises(ValidationError, match="begins with the end"):
        ManyShotConfig(separator="==")
    with pytest.raises(ValidationError, match="0 or more"):
        ManyShotConfig(shots=[-1])
    assert numbers(None, 40) == [1, 2, 4, 8, 16, 32, 40] and numbers(None, 8) == [1, 2, 4, 8]
    assert numbers(["full", 3, 0], 8) == [0, 3, 8] and numbers(None, 0) == []


def run_of(name: str, values: dict[str, dict[str, Any]]) -> RunResults:
    arms = [
        ArmResults(arm, arm, "softmax", {0: SeedResults(results={name: {"config": {}, "values": v}})})
        for arm, v in values.items()
    ]
    return RunResults({"name": "run"}, {}, arms)


def test_the_report_compares_text_by_text_and_shows_levels_and_answers(tmp_path: Path) -> None:
    good = run(tmp_path, shots=[0, 1, 8])
    bad = run(tmp_path, Speller(words(), lambda prompt: "yes").eval(), shots=[0, 1, 8])
    section = ManyShot().section(run_of("many_shot", {"reader": good, "parrot": bad}))
    share = (
        good["sets"][0]["points"][2]["correct"].count("1") / 20
        - bad["sets"][0]["points"][2]["correct"].count("1") / 20
    )
    assert f"(q with 8 demonstrations): parrot is worse than reader by {share:.2f}" in section.answer
    chart, table = section.charts[0], section.tables[0]
    assert [r.label for r in chart.references] == ["chance", "most frequent label"]  # type: ignore[union-attr]
    assert "Chance 0.333; always the most frequent label 0.350." in table.caption
    assert table.headers[-1] == "parrot against reader" and "worse by" in str(table.rows[2][-1])
    assert str(table.rows[2][1]).startswith("1.00 (0.84 to 1.00, n=20)")
    marks = [str(row[0]) for row in section.tables[1].rows]
    assert marks.count("reader, right") == 2 and marks.count("parrot, wrong") == 2
    assert "5.2 to 21.6" in str(section.tables[2].rows)
    assert any("3 labels, 20 texts asked, 40 to demonstrate with" in note for note in section.notes)
    same = ManyShot().section(run_of("many_shot", {"a": good, "b": good}))
    assert "No difference from a detected for b" in same.answer
    one = ManyShot().section(run_of("many_shot", {"a": good}))
    assert "a: 1.00 (0.84 to 1.00, n=20, 1 seed)" in one.answer
    missing = ManyShot().section(run_of("many_shot", {"a": {"skipped": "why"}}))
    assert missing.missing and "why" in missing.answer


def test_prompts_do_not_depend_on_the_model_or_its_tokenizer(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    texts = []
    for folder, tokenizer in zip(folders, (words(), joining()), strict=True):
        folder.mkdir()
        source = write(tmp_path / "q.jsonl", QUESTIONS)
        config = ManyShotConfig(**{**SMALL, "sets": [source], "shots": [2], "length": 400, "items": 6})
        ManyShot().run(subject_of(tiny.llama(400), tokenizer, folder), config)
        rows = lines(folder / "many_shot.jsonl")
        bos = str(tokenizer.bos_token)
        texts.append(
            sorted(
                (r["draw"], r["index"], r.get("asked") or r["demonstrations"].removeprefix(bos)) for r in rows
            )
        )
    assert texts[0] == texts[1] and len(texts[0]) == 8
    assert np.unique([text for _, _, text in texts[0]]).size == 8


def test_a_tokenizer_without_bos_begins_with_the_first_demonstration_and_the_report_says_so(
    tmp_path: Path,
) -> None:
    tokenizer = words()
    tokenizer.bos_token = None
    source = write(tmp_path / "q.jsonl", QUESTIONS)
    model = Speller(tokenizer, reader_of_labels).eval()
    config = ManyShotConfig(**{**SMALL, "sets": [source], "shots": [4], "items": 6})
    values = ManyShot().run(subject_of(model, tokenizer, tmp_path), config)
    assert values["sets"][0]["points"][0]["correct"] == "111111"
    context = next(r for r in lines(tmp_path / "many_shot.jsonl") if r["index"] == -1)
    assert context["demonstrations"].startswith("Question: what is number")
    notes = ManyShot().section(run_of("many_shot", {"a": values})).notes
    assert any("no bos token" in note for note in notes)
