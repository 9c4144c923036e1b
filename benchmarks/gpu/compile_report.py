"""Compile the kernels for GPUs that need not be there, and report what the objects say of themselves.

    python benchmarks/gpu/compile_report.py            every configuration of the table -> results/triton_compile.jsonl
    python benchmarks/gpu/compile_report.py --choose   rewrite the table: the largest tile without a spill
    python benchmarks/gpu/compile_report.py --check    compile again and compare with the report; writes nothing

A table chosen so has been timed nowhere: `tune.py` measures on a GPU and takes what is fastest there.
"""

import argparse
import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import triton
from compiling import COMPACT, ENDED, MASKS, compile_one, good

from clearhead.kernels.triton import configs
from clearhead.kernels.triton.configs import ARCHITECTURES, DIRECTIONS, Config, Key

RESULTS = Path(__file__).parents[1] / "results" / "triton_compile.jsonl"
TABLE = Path(configs.__file__).with_name("configs.json")
WIDTHS = (64, 128, 256)
# Value width over key width, and streams: V1, softmax and V2.
FORMS = ((2, 2), (1, 1), (1, 2))


def keys(widths: tuple[int, ...] = WIDTHS) -> Iterator[Key]:
    for bits, (wide, streams), width, architecture, direction in itertools.product(
        (16, 32), FORMS, widths, ARCHITECTURES, DIRECTIONS
    ):
        yield Key(architecture, direction, bits, width, wide * width, streams)


# Tiles worth trying, from the largest, by how many sums a row (forward) or a key (backward) has.
TILES = {
    "forward": {
        128: ((128, 64, 8), (64, 64, 4), (64, 64, 8), (64, 32, 8), (32, 32, 8)),
        256: ((64, 64, 8), (64, 32, 8), (32, 64, 8), (32, 32, 8), (16, 32, 8)),
        512: ((64, 32, 8), (32, 32, 8), (16, 32, 8), (16, 16, 8)),
        1024: ((16, 32, 8), (16, 16, 8)),
    },
    "decode": {
        128: ((16, 128, 4), (16, 64, 4), (16, 32, 4)),
        256: ((16, 64, 4), (16, 32, 4), (16, 32, 8), (16, 16, 8)),
        512: ((16, 64, 8), (16, 32, 8), (16, 16, 8)),
        1024: ((16, 32, 8), (16, 16, 8)),
    },
    "backward": {
        128: ((64, 64, 8), (64, 32, 8), (32, 64, 8), (32, 32, 8), (16, 32, 8)),
        256: ((32, 64, 8), (32, 32, 8), (16, 32, 8), (16, 16, 8)),
        512: ((32, 32, 8), (16, 32, 8), (16, 16, 8)),
        1024: ((16, 16, 8),),
    },
}


def sums(key: Key) -> int:
    """Numbers that a row, or in the backward pass a key, is summed up in."""
    if key.direction != "backward":
        return key.streams * key.value_width
    own_keys = key.streams == 2 and key.value_width > key.width
    return (1 + own_keys) * key.width + key.value_width


def candidates(key: Key) -> list[Config]:
    tiles = TILES[key.direction]
    which = tiles[min(size for size in tiles if size >= sums(key))]
    # Products of float32 numbers are many single instructions: small tiles.
    which = which if key.bits == 16 else which[-2:]
    # Loads one tile ahead where there is room for it.
    return [Config(*tile, stages) for tile in which for stages in (2, 1)]


def choose(key: Key) -> tuple[Key, Config | None]:
    """The first candidate without spills under every mask."""
    for config in candidates(key):
        if all(good(compile_one(key, config_of(key, config, m), m)) for m in reversed(masks_of(key))):
            return key, config
    return key, None


def masks_of(key: Key) -> tuple[str, ...]:
    """What a row of the table is compiled with."""
    few = key.bits == 16 and key.width <= 128
    more = {"forward": (ENDED,), "decode": (COMPACT,)}.get(key.direction, ()) if few else ()
    return (*MASKS, *more)


def config_of(key: Key, config: Config, masks: str) -> Config:
    """What a row of the table stands for under these masks."""
    return configs.for_held_keys(key, config) if masks == COMPACT else config


def report(key: Key, config: Config, wanted: list[str]) -> list[dict[str, Any]]:
    head = {name: getattr(key, name) for name in Key.__dataclass_fields__}
    rows = []
    for masks in masks_of(key):
        if masks not in wanted:
            continue
        own = config_of(key, config, masks)
        tile = {name: getattr(own, name) for name in Config.__dataclass_fields__}
        found = compile_one(key, own, masks)
        rows.append(head | tile | {"masks": masks, "triton": triton.__version__} | found)
    return rows


def fault(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """What is worse than the committed report says, or None. Another Triton may use other registers."""
    if "refused" in now:
        return None if "refused" in before else f"refused: {now['refused']}"
    if not now["shared fits"]:
        return f"{now['shared']} bytes of shared memory do not fit"
    if now["spills"] > before.get("spills", 0):
        return f"spills {now['spills']}, not {before.get('spills', 0)}"
    if before["mix"]["matrix"] and not now["mix"]["matrix"]:
        return "no tensor-core instructions"
    return None


def check(rows: list[dict[str, Any]], pool: ProcessPoolExecutor) -> int:
    """Compile the committed rows again; how many are worse than they say."""
    found = pool.map(compile_one, map(_key, rows), map(_config, rows), (row["masks"] for row in rows))
    worse = 0
    for row, now in zip(rows, found, strict=True):
        reason = fault(row, now)
        worse += reason is not None
        print(_told(row), reason or "as reported", flush=True)
    print(f"{len(rows) - worse} of {len(rows)} as reported")
    return worse


def fits(row: dict[str, Any], table: dict[Key, Config]) -> bool:
    """Whether a line of the report is of this table."""
    key = _key(row)
    return key in table and config_of(key, table[key], row["masks"]) == _config(row)


def _told(row: dict[str, Any]) -> str:
    key = _key(row)
    widths = f"{key.width} and {key.value_width} wide"
    return f"{key.architecture} {key.direction} {key.bits} bits, {widths}, {row['masks']}:"


def _key(row: dict[str, Any]) -> Key:
    return Key(**{name: row[name] for name in Key.__dataclass_fields__})


def _config(row: dict[str, Any]) -> Config:
    return Config(**{name: row[name] for name in Config.__dataclass_fields__})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--choose", action="store_true", help="rewrite the table")
    parser.add_argument("--check", action="store_true", help="compare with the committed report")
    parser.add_argument("--sample", type=int, help="with --check: only so many rows, spread over the report")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--bits", type=int, choices=(16, 32), help="only the rows for numbers of so many bits"
    )
    parser.add_argument(
        "--widths", type=int, nargs="+", default=list(WIDTHS), help="only the rows of these key widths"
    )
    parser.add_argument(
        "--architectures", nargs="+", default=list(ARCHITECTURES), help="only the rows of these"
    )
    parser.add_argument(
        "--directions", nargs="+", default=list(DIRECTIONS), choices=DIRECTIONS, help="only the rows of these"
    )
    every = (*MASKS, ENDED, COMPACT)
    parser.add_argument(
        "--masks", nargs="+", default=list(every), choices=every, help="only these sets of masks"
    )
    arguments = parser.parse_args()
    wanted = [
        key
        for key in keys(tuple(arguments.widths))
        if arguments.bits in (None, key.bits)
        and key.architecture in arguments.architectures
        and key.direction in arguments.directions
    ]
    with ProcessPoolExecutor(arguments.processes) as pool:
        if arguments.check:
            rows = [row for row in _before() if _key(row) in wanted and row["masks"] in arguments.masks]
            table = configs.table()
            stale = [_told(row) for row in rows if not fits(row, table)]
            if stale:
                raise SystemExit(f"the report is of another table: {stale[0]} ... ({len(stale)} rows)")
            step = 1 if arguments.sample is None else max(1, len(rows) // arguments.sample)
            raise SystemExit(1 if check(rows[::step][: arguments.sample], pool) else 0)
        if arguments.choose:
            table = configs.read(TABLE.read_text()) if TABLE.exists() else {}
            for key, config in pool.map(choose, wanted):
                print(key, config, flush=True)
                # Where nothing is without a spill, the smallest tile; the report says what it spills.
                table[key] = config or Config(16, 16, 8, 1)
                TABLE.write_text(configs.write(table))
            return
        table = configs.table()
        chosen = [(key, table[key]) for key in wanted if key in table]
        asked = [arguments.masks] * len(chosen)
        found = [row for rows in pool.map(report, *zip(*chosen, strict=True), asked) for row in rows]
    # Rows of the table that were not asked for keep what was found of them before.
    told = {_place(row): row for row in (*_before(), *found)}
    RESULTS.write_text("".join(json.dumps(told[place]) + "\n" for place in sorted(told)))


def _before() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    return (*(row[name] for name in Key.__dataclass_fields__), row["masks"])


if __name__ == "__main__":
    main()
