"""Launch configurations: a table in the package, by architecture, direction, bits of a number, widths and streams.

Nothing is tuned at the first call. `benchmarks/gpu/tune.py` measures on a GPU and rewrites the table.
"""

import json
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any

import torch

DIRECTIONS = ("forward", "decode", "backward")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
# Rows of a key-value group (query tokens times query heads of a group) up to which a call counts as decoding.
FEW_ROWS = 64


@dataclass(frozen=True, slots=True)
class Config:
    """A tile of `block_m` rows and `block_n` keys, computed by `warps` warps with loads `stages` tiles ahead."""

    block_m: int
    block_n: int
    warps: int
    stages: int


# The interpreter knows no warps; its tiles are small, so that small problems have several.
INTERPRETED = Config(16, 16, 1, 1)


@dataclass(frozen=True, slots=True, order=True)
class Key:
    """What a configuration is for: widths as powers of two, `bits` of a number of q, k and v."""

    architecture: str
    direction: str
    bits: int
    width: int
    value_width: int
    streams: int


def padded(width: int) -> int:
    """The power of two that a tile of `width` numbers takes, at least the 16 that a matrix instruction wants."""
    return max(16, 1 << (width - 1).bit_length())


@cache
def table() -> dict[Key, Config]:
    """The committed table."""
    return read(files(__package__).joinpath("configs.json").read_text())


def read(text: str) -> dict[Key, Config]:
    rows: list[dict[str, Any]] = json.loads(text)
    key, config = Key.__dataclass_fields__, Config.__dataclass_fields__
    return {
        Key(**{name: row[name] for name in key}): Config(**{name: row[name] for name in config})
        for row in rows
    }


def write(configs: dict[Key, Config]) -> str:
    """`configs` as the table's file: one row a line, in order."""
    names = (*Key.__dataclass_fields__, *Config.__dataclass_fields__)
    lines = []
    for key in sorted(configs):
        values = [
            getattr(key, n, None) if n in Key.__dataclass_fields__ else getattr(configs[key], n)
            for n in names
        ]
        lines.append(json.dumps(dict(zip(names, values, strict=True))))
    return "[\n" + ",\n".join(lines) + "\n]\n"


def architecture(device: torch.device) -> str:
    """The table's architecture for `device`: its own, or the newest older one of the same maker."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    number = 10 * torch.cuda.get_device_capability(device)[0]
    return f"sm_{max(known for known in (80, 90, 100) if known <= max(number, 80))}"


def choose(key: Key) -> Config:
    """The configuration of `key`, or of the next heavier row of the table: more streams, or wider."""
    if key.architecture == "interpreter":
        return INTERPRETED
    rows = [
        other
        for other in table()
        if (other.architecture, other.direction, other.bits) == (key.architecture, key.direction, key.bits)
        and other.streams >= key.streams
        and other.width >= key.width
        and other.value_width >= key.value_width
    ]
    return table()[min(rows, key=lambda row: (row.streams, row.width, row.value_width))]


def for_held_keys(key: Key, config: Config) -> Config:
    """The same for keys that are held at half their width: a tile of their table lies beside each of theirs.

    More than 64 keys of more than 64 numbers spill on sm_90.
    """
    return config if key.streams * key.width <= 64 else replace(config, block_n=min(config.block_n, 64))
