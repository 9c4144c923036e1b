"""Order robustness: margins, what of them is chance, and permutations of the same demonstrations."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from clearhead.analysis.margins import margin, margin_by_chance, margin_difference, mean_margin
from clearhead.evals.in_context.order_robustness.evaluation import OrderRobustness, OrderRobustnessConfig
from tests.evals import tiny
from tests.evals.test_many_shot import (
    NAMES,
    QUESTIONS,
    SMALL,
    Speller,
    lines,
    reader_of_labels,
    run_of,
    subject_of,
    words,
)
from tests.evals.test_many_shot_data import write


def outcomes(probabilities: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    return (np.random.default_rng(seed).random(probabilities.shape) < probabilities).astype(float)


def test_the_margin_by_chance_is_that_of_every_way_to_deal_the_outcomes() -> None:
    table = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 0]], dtype=float)
    assert margin(table) == pytest.approx(2 / 3)
    # Each text's outcomes in each of their 3! orders, all equally likely.
    ways = itertools.product(*(list(itertools.permutations(column)) for column in table.T))
    every = [margin(np.array(way).T) for way in ways]
    chance = margin_by_chance(table, resamples=20_000)
    assert chance.mean == pytest.approx(np.mean(every), abs=0.01)
    assert chance.pvalue == pytest.approx(np.mean([m > 0.6 for m in every]), abs=0.015)
    assert chance.high == pytest.approx(np.quantile(every, 0.95))
    assert margin_by_chance(np.ones((4, 9))).pvalue == 1.0


def test_orders_that_do_not_matter_are_rarely_said_to_and_intervals_cover_the_margin() -> None:
    hard = np.random.default_rng(0).random((1, 80))
    pvalues, covered = [], 0
    for trial in range(60):
        table = outcomes(np.broadcast_to(hard, (10, 80)), trial)
        pvalues.append(margin_by_chance(table, resamples=200).pvalue)
        estimate = mean_margin([[table]])
        covered += estimate.low <= 0.0 <= estimate.high
        assert estimate.value > 0, "best minus worst is above 0 all the same"
    assert 0 <= sum(p <= 0.05 for p in pvalues) <= 8 and covered >= 53
    # One order is truly worse by 0.3.
    worse = np.full((10, 80), 0.7)
    worse[3] = 0.4
    hits = [mean_margin([[outcomes(worse, trial)]]) for trial in range(60)]
    assert sum(one.low <= 0.3 <= one.high for one in hits) >= 52
    assert margin_by_chance(outcomes(worse, 1), resamples=500).pvalue < 0.01


def test_margins_of_arms_are_compared_on_the_same_texts() -> None:
    table = outcomes(np.full((5, 60), 0.6), 0)
    same = margin_difference([[table]], [[table]])
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    worse = table.copy()
    worse[2] = 0.0
    found = margin_difference([[worse]], [[table]])
    assert found.low > 0.3 and found.value == pytest.approx(margin(worse) - margin(table))
    assert mean_margin([[table], [worse]]).seeds == 2 and mean_margin([[table], [worse]]).low == 0.0


def last_shown(prompt: str) -> str:
    """Says the label of the last demonstration, so that everything hangs on the order."""
    return str(re.findall(r"\nType: ([^\n]+)\n", prompt)[-1])


def moody(prompt: str) -> str:
    """Reads the demonstrations only if the last one is of one label."""
    return reader_of_labels(prompt) if last_shown(prompt) == "yes" else "human being"


def run(
    tmp_path: Path, reply: Any = last_shown, folder: Path | None = None, **settings: Any
) -> dict[str, Any]:
    tokenizer = words()
    settings = {"permutations": 4, "shots": 6, **{k: v for k, v in SMALL.items() if k != "draws"}, **settings}
    settings.setdefault("sets", [write(tmp_path / "q.jsonl", QUESTIONS)])
    model = Speller(tokenizer, reply).eval()
    return OrderRobustness().run(subject_of(model, tokenizer, folder), OrderRobustnessConfig(**settings))


def test_permutations_share_demonstrations_and_texts_and_are_resumed(tmp_path: Path) -> None:
    values = run(tmp_path, folder=tmp_path)
    (one,) = values["sets"]
    assert one["shots"] == 6 and set(one["orders"]) == {"random", "by_class"}
    rows = lines(tmp_path / "order_robustness.jsonl")
    contexts = {(r["order"], r["permutation"]): r["demonstrations"] for r in rows if r["index"] == -1}
    sets = {tuple(sorted(text.removeprefix("<|bos|>").split("\n==\n"))) for text in contexts.values()}
    assert len(contexts) == 8 and len(sets) == 1 and len(set(contexts.values())) > 6
    for (order, number), context in contexts.items():
        labels = re.findall(r"\nType: ([^\n]+)\n", context)
        if order == "by_class":
            assert labels[:3] == labels[3:] and set(labels[:3]) == set(NAMES)
        said = [
            row for row in rows if (row["order"], row["permutation"]) == (order, number) and row["index"] >= 0
        ]
        assert [row["index"] for row in sorted(said, key=lambda r: r["index"])] == list(range(20))
        marks = "".join(
            "1" if r["label"] == labels[-1] else "0" for r in sorted(said, key=lambda r: r["index"])
        )
        assert one["orders"][order][number] == marks

    # A killed run goes on where it was.
    (tmp_path / "order_robustness.jsonl").rename(tmp_path / "order_robustness.partial.jsonl")
    part = tmp_path / "order_robustness.partial.jsonl"
    part.write_text("\n".join(part.read_text().split("\n")[:100]) + "\n")
    kept = len(json.dumps(values))
    again = run(tmp_path, folder=tmp_path)
    assert again["sets"] == values["sets"] and len(json.dumps(again)) == kept


def test_how_many_demonstrations_and_what_is_left_out(tmp_path: Path) -> None:
    assert run(tmp_path, shots=None, length=2000, permutations=2, items=2)["sets"][0]["shots"] == 58
    tight = run(tmp_path, shots=None, permutations=2, orders=["random"])["sets"][0]
    assert 6 < tight["shots"] < 40 and tight["tokens"] <= 400
    assert "more than length 400" in run(tmp_path, shots=39)["skipped"]
    assert "has 40 texts to demonstrate with" in run(tmp_path, shots=41)["skipped"]
    assert "no two demonstrations" in run(tmp_path, shots=None, length=40)["skipped"]
    with pytest.raises(ValueError, match="items is 58"):
        run(tmp_path, items=58)
    model = tiny.gpt2(400)
    config = OrderRobustnessConfig(sets=[str(tmp_path / "q.jsonl")], items=20, shots=3)
    values = OrderRobustness().run(subject_of(model, words()), config)
    assert "more than the model takes" in values["skipped"]


def test_the_report_says_whether_order_matters_and_who_minds_it_less(tmp_path: Path) -> None:
    swayed = run(tmp_path, moody, permutations=6)
    steady = run(tmp_path, lambda prompt: "yes", permutations=6)
    section = OrderRobustness().section(run_of("order_robustness", {"swayed": swayed, "steady": steady}))
    assert "Best minus worst order (q random, q by_class): steady is better than swayed by" in section.answer
    estimate = section.headlines[1].estimate
    assert estimate is not None and estimate.value == estimate.high == 0.0
    assert section.measure.endswith("↓")
    random = section.tables[0]
    assert random.title == "q, random" and str(random.rows[1][2]) == "0.00 (95 % below 0.00), p = 1.000"
    assert "6 demonstrations in 6 orders. Accuracy by chance 0.333" in random.caption
    assert [str(row[0]) for row in section.tables[2].rows][:2] == ["swayed, right", "swayed, right"]
    alone = OrderRobustness().section(run_of("order_robustness", {"swayed": swayed}))
    assert "swayed: 0." in alone.answer and "1 seed" in alone.answer
    missing = OrderRobustness().section(run_of("order_robustness", {"a": {"skipped": "why"}}))
    assert missing.missing and "why" in missing.answer
