"""A run directory with made-up but plausible files: what the report is developed and tested against."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

ARMS = {
    "Transformer": "softmax",
    "DIFF V1": "differential",
    "DIFF V2": "differential_v2",
    "CoCA": "collinear",
}
SKILL = {"Transformer": 0.86, "DIFF V1": 0.97, "DIFF V2": 0.95, "CoCA": 0.9}
LENGTHS, DEPTHS = (128, 256, 512), (0.0, 0.25, 0.5, 0.75, 1.0)
SUITES = ["language_modelling", "loss_by_position", "needles", "allocation", "mastery"]

RECIPE = """\
name = "demo"
description = "Four kinds of attention, trained on the same real text in the same order."
seeds = {seeds}

[corpus]
source = "stdlib"

[data]
length = 256
needle_share = 0.2

[train]
tokens = 5_000_000

[evaluate]
suites = {suites}

"""


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def slug(arm: str) -> str:
    return arm.lower().replace(" ", "-")


def make_run(root: Path, seeds: tuple[int, ...] = (0, 1, 2)) -> Path:
    """Write a complete run into ``root``."""
    root.mkdir(parents=True, exist_ok=True)
    recipe = RECIPE.format(seeds=list(seeds), suites=json.dumps(SUITES))
    for arm, attention in ARMS.items():
        recipe += f'[[arms]]\nname = "{arm}"\nattention = "{attention}"\n'
    (root / "recipe.toml").write_text(recipe)
    write(
        root / "env.json", {"python": "3.11.2", "versions": {"torch": "2.13.0", "numpy": "2.3"}, "cores": 2}
    )
    for index, arm in enumerate(ARMS):
        for seed in seeds:
            job = root / "arms" / slug(arm) / f"seed-{seed}"
            rng = np.random.default_rng([index, seed])
            write(job / "job.json", {})
            write(job / "status.json", {"state": "evaluated", "step": 1200, "steps": 1200})
            write(
                job / "cost.json",
                {
                    "parameters": 120_000 + 384 * (index == 1) + 9000 * (index == 2),
                    "flops_per_token": 8.1e5 * (1, 1.25, 1.3, 1.02)[index],
                    "kv_bytes_per_token": 1024,
                    "tokens_per_second": 41_000 * (1, 0.82, 0.8, 0.93)[index] + 300 * rng.normal(),
                    "peak_memory_bytes": 6.1e8,
                    "seconds": 122.0,
                },
            )
            (job / "metrics.jsonl").write_text(
                "".join(json.dumps(record) + "\n" for record in metrics(arm, index, rng))
            )
            for name, values in results(arm, index, rng).items():
                write(
                    job / "results" / f"{name}.json",
                    {
                        "evaluation": name,
                        "arm": arm,
                        "seed": seed,
                        "config": {},
                        "seconds": 1.0,
                        "values": values,
                    },
                )
    return root


def metrics(arm: str, index: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    moment = rng.uniform(1.2, 3.4) * 1e6 * (1.25, 0.75, 0.8, 1.05)[index]
    records: list[dict[str, Any]] = []
    for step in range(10, 1221, 10):
        tokens = step * 4096
        level = 2.35 - 0.04 * (index == 1) + 4.5 * math.exp(-tokens / 3e5) + 0.5 * math.exp(-tokens / 2e6)
        record: dict[str, Any] = {
            "step": step,
            "tokens": tokens,
            "loss": level * 1.4,
            "bits_per_byte": level + 0.03 * rng.normal(),
            "grad_norm": 0.5,
            "learning_rate": 1e-3,
            "tokens_per_second": 41_000.0 * (1, 0.82, 0.8, 0.93)[index],
        }
        if "DIFF" in arm:
            record["lambda"] = {
                "0": 0.2 + 0.15 * tokens / 5e6,
                "1": 0.36 + 0.08 * (index == 2) + 0.1 * tokens / 5e6,
            }
        records.append(record)
        if step % 50 == 0:
            accuracy = SKILL[arm] / (1 + math.exp(-(tokens - moment) / 1.2e5))
            records.append(
                {"step": step, "tokens": tokens, "probe": {"needle_accuracy": min(1.0, accuracy * 1.02)}}
            )
    return records


def results(arm: str, index: int, rng: np.random.Generator) -> dict[str, dict[str, Any]]:
    shared = np.random.default_rng(5)
    size = shared.integers(800, 9000, 60)
    bits = size * (2.3 + 0.4 * shared.normal(size=60)) * (1, 0.985, 0.99, 1.003)[index] + 15 * rng.normal(
        size=60
    )
    positions = [1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 320, 384, 448, 511]
    worse = (0.9, 0.8, 0.7, 0.15)[index]
    loss = [
        4.6 - 0.35 * math.log2(p + 1) ** 0.9 + (worse * (p - 256) / 256 if p > 256 else 0) for p in positions
    ]
    cumulative = [
        4.7 - 0.3 * math.log2(p + 1) ** 0.9 + (worse * (p - 256) / 512 if p > 256 else 0) for p in positions
    ]
    depth_noise = rng.normal(0, 0.02, len(DEPTHS))
    answer = np.clip([0.05, 0.28, 0.3, 0.11][index] + depth_noise, 0, 1)
    noise = np.clip([0.5, 0.12, 0.14, 0.4][index] - depth_noise, 0, 1)
    draw = rng.normal(0, 0.04, 100)
    samples = np.random.default_rng(11).normal(3.0, 0.4, 48)
    reached = [
        record
        for record in metrics(arm, index, rng)
        if record.get("probe", {}).get("needle_accuracy", 0) >= 0.9
    ]
    return {
        "language_modelling": {
            "bits_per_byte": float(bits.sum() / size.sum()),
            "perplexity": 12.0,
            "length": 256,
            "stride": 128,
            "n": 60,
            "tokens": 81_234,
            "documents": [f"doc{i}.py" for i in range(60)],
            "bits": bits.tolist(),
            "bytes": size.tolist(),
        },
        "loss_by_position": {
            "length": 512,
            "n": 48,
            "positions": positions,
            "loss": band(loss, 0.08),
            "cumulative": band(cumulative, 0.05),
            "documents": [f"doc{i}.py" for i in range(48)],
            "within": (samples + 0.05 * rng.normal(size=48)).tolist(),
            "beyond": (samples + worse / 2 + 0.1 * rng.normal(size=48)).tolist(),
        },
        "needles": {
            "cells": [
                cell(arm, needles, length, depth, rng)
                for needles in (1, 4)
                for length in LENGTHS
                for depth in DEPTHS
            ],
            "skipped_cells": {
                "4 x 4096": "4096 tokens is more than the model takes (max_position_embeddings = 2048)"
            },
            "chance": 2.4e-6,
            "n": 1200,
        },
        "allocation": {
            "normalisation": "absolute",
            "length": 256,
            "needles": 4,
            "n": 100,
            "depths": list(DEPTHS),
            "parts": {
                "answer": np.clip(answer.mean() + draw, 0, 1).tolist(),
                "question": [0.15] * 100,
                "first token": (1 - answer.mean() - noise.mean() - 0.15 + 0 * draw).tolist(),
                "noise": np.clip(noise.mean() - draw, 0, 1).tolist(),
            },
            "by_depth": {
                "answer": answer.tolist(),
                "question": [0.15] * 5,
                "first token": (0.85 - answer - noise).tolist(),
                "noise": noise.tolist(),
            },
            "by_layer": {part: [0.2, 0.3] for part in ("answer", "question", "first token", "noise")},
            "answer_by_head": [[0.1, 0.3], [0.7, 0.2]],
            "negative": 0.21 if "DIFF" in arm else 0.0,
            "negative_by_layer": [0.18, 0.24] if "DIFF" in arm else [0.0, 0.0],
        },
        "mastery": {
            "threshold": 0.9,
            "mastered": bool(reached),
            "tokens": reached[0]["tokens"] if reached else 1220 * 4096,
            "budget": 5_000_000,
            "final_accuracy": SKILL[arm],
            "best_accuracy": SKILL[arm],
            "n": 24,
        },
    }


def band(values: list[float], half: float) -> dict[str, list[float]]:
    return {"mean": values, "low": [v - half for v in values], "high": [v + half for v in values]}


def cell(arm: str, needles: int, length: int, depth: float, rng: np.random.Generator) -> dict[str, Any]:
    level = (
        SKILL[arm] * (1 if length <= 256 else 0.35 if arm != "CoCA" else 0.8) * (1 if needles == 1 else 0.75)
    )
    level = min(1.0, level * (0.9 + 0.12 * depth))
    marks = rng.random(40) < level
    return {
        "needles": needles,
        "length": length,
        "depth": depth,
        "n": 40,
        "hits": int(marks.sum()),
        "correct": "".join("01"[int(mark)] for mark in marks),
        "untrained_n": 10,
        "untrained_hits": 0,
    }
