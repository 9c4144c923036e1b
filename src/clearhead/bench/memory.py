"""Peak memory of one call of a peer, in a process of its own.

That is `python -m clearhead.bench.memory`, which reads its job from standard input.
"""

import json
import subprocess
import sys
from dataclasses import asdict

from clearhead.bench.cases import AttentionCase

# Tokens of the call that loads code and starts threads, so that the measured one does not pay for them.
FIRST_LENGTH = 64


def extra_memory(case: AttentionCase, peer: str, threads: int) -> tuple[int | None, str | None]:
    """(bytes, None): the peak during one call, minus what the process held with its inputs made; or (None, reason)."""
    job = json.dumps({"case": asdict(case), "peer": peer, "threads": threads})
    done = subprocess.run(
        [sys.executable, "-m", "clearhead.bench.memory"], input=job, capture_output=True, text=True
    )
    if done.returncode < 0:
        return None, f"its process was ended by signal {-done.returncode}, most likely for want of memory"
    if done.returncode:
        return None, (done.stderr.strip().splitlines() or ["its process failed"])[-1]
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
        return answer["bytes"], answer["reason"]
    except (ValueError, LookupError, TypeError):
        return None, "its process said nothing that can be read"


def _measured(case: AttentionCase, peer: str) -> dict[str, int | str | None]:
    from clearhead.bench import machine, peers
    from clearhead.bench.measure import warm_up

    if machine.memory_kilobytes("VmHWM") is None:
        return {"bytes": None, "reason": "this system does not tell a process its peak memory"}
    try:
        first = case.of_length(FIRST_LENGTH)
        warm_up({peer: peers.timed_call(peers.build(peer, first), first)}, calls=1)
        call = peers.timed_call(peers.build(peer, case), case)
    except peers.Unavailable as error:
        return {"bytes": None, "reason": str(error)}
    before = machine.memory_kilobytes("VmRSS")
    with machine.limited_memory():
        failed = warm_up({peer: call}, calls=1)
    peak = machine.memory_kilobytes("VmHWM")
    assert before is not None and peak is not None
    if failed:
        return {"bytes": None, "reason": failed[peer]}
    return {"bytes": 1024 * (peak - before), "reason": None}


if __name__ == "__main__":
    import torch

    task = json.load(sys.stdin)
    torch.set_num_threads(task["threads"])
    chosen = {**task["case"], "peers": tuple(task["case"]["peers"])}
    print(json.dumps(_measured(AttentionCase(**chosen), task["peer"])))
