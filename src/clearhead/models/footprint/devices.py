"""The table of devices and the fleet that a name such as `8xh100` stands for."""

import re
import tomllib
from dataclasses import dataclass, fields
from functools import cache
from importlib.resources import files

from clearhead.registry import did_you_mean


@dataclass(frozen=True)
class DeviceSheet:
    """One device, from `devices.toml`: GB of memory, 10¹² FLOPs a second, GB a second."""

    title: str
    memory: float
    flops: float
    float32: float
    bandwidth: float
    link: float
    node: int
    network: float


@dataclass(frozen=True)
class Fleet:
    """`count` devices of one kind; those of a node are joined by `link`, nodes by `network`."""

    name: str
    count: int
    device: DeviceSheet

    @property
    def wire(self) -> float:
        """Bytes a second and device, in one direction, of the slowest connection that a collective crosses."""
        if self.count == 1:
            return float("inf")
        return 1e9 * (self.device.link if self.count <= self.device.node else self.device.network)


@cache
def devices() -> dict[str, DeviceSheet]:
    """Every device of the table by name."""
    table = tomllib.loads((files("clearhead.models.footprint") / "devices.toml").read_text(encoding="utf-8"))
    known = {field.name for field in fields(DeviceSheet)}
    assert all(set(entry) == known for entry in table.values())
    return {name: DeviceSheet(**entry) for name, entry in table.items()}


def fleet(text: str) -> Fleet:
    """`8xh100` or `h100` -> the fleet. Raises ValueError for what is neither, with the nearest device."""
    found = re.fullmatch(r"(?:(\d+)\s*[x*×])?\s*([a-z][a-z0-9-]*)", text.strip().lower())
    count = int(found[1] or 1) if found else 0
    if found is None or not 1 <= count <= 10**6:
        raise ValueError(f"{text!r} is no number of devices: write 8xh100, or h100 for one")
    name = found[2]
    if name not in devices():
        raise ValueError(f"{text!r}: unknown device {name!r}; {did_you_mean(name, devices())}")
    return Fleet(f"{count}x{name}", count, devices()[name])
