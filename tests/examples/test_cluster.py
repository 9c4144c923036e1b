"""The Slurm script and the Kubernetes manifest: what can be known of them without a cluster."""

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from clearhead.cli.main import app
from clearhead.runs.recipe_io import load_recipe

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "cluster" / "train.sbatch"
MANIFEST = ROOT / "examples" / "cluster" / "train.yaml"
RECIPE = "recipes/paper/diff-3b.toml"
# Stand-ins for Slurm's commands: each writes down how it was called; srun trains until it is told to stop.
SCONTROL = """echo scontrol "$@" >> "$CALLS"; if [ "$1" = show ]; then echo node1; echo node2; fi"""
SRUN = """printf '%s\\n' "srun" "$@" >> "$CALLS"; trap 'echo stopped >> "$CALLS"; exit 143' TERM
for i in $(seq 100); do sleep 0.05; done"""


def check_training(arguments: list[str], runs: str) -> None:
    """The command line after torchrun's own options is one that `clearhead train` takes, of a recipe that it takes."""
    assert arguments[:3] == ["-m", "clearhead", "train"]
    train: Any = get_command(app).commands["train"]  # type: ignore[attr-defined]
    found = train.make_context("train", list(arguments[3:])).params
    assert (found["arm"], found["seed"], str(found["out"])) == ("DIFF", 0, f"{runs}/diff-3b")
    recipe = load_recipe(ROOT / found["recipe"], found["overrides"])
    recipe.arm("DIFF")
    parallel = recipe.train.parallel
    assert (parallel.fsdp, parallel.rows, parallel.checkpointing) == (True, 1, True)
    # A step's rows are shared out evenly over 4 x 8 devices, a row at a time.
    assert recipe.train.batch_tokens // recipe.data.length % 32 == 0


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """An environment with the stand-ins, in which the job runs on two nodes of eight GPUs."""
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
    told = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2"}
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return {"PATH": path, "CALLS": str(tmp_path / "calls"), "RUNS": str(tmp_path / "runs"), **told}


def begun(slurm: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", str(SCRIPT), *arguments], env=slurm, cwd=ROOT, text=True, stderr=subprocess.PIPE
    )


def test_the_script_is_one_that_bash_and_slurm_read() -> None:
    assert subprocess.run(["bash", "-n", str(SCRIPT)], capture_output=True).stderr == b""
    lines = SCRIPT.read_text().splitlines()
    told = [line for line in lines if line.startswith("#SBATCH ")]
    # Slurm reads no further than the first command.
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert lines.index(told[-1]) < first
    options = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in told)
    assert options["ntasks-per-node"] == "1" and options["signal"].startswith("B:USR1@")
    assert "requeue" in options and options["open-mode"] == "append"


def test_before_its_time_limit_the_job_is_queued_again(slurm: dict[str, str]) -> None:
    calls = Path(slurm["CALLS"])
    job = begun(slurm, RECIPE, "DIFF", "0", "corpus.source=/data/*.parquet")
    for _ in range(400):
        if calls.exists() and "parquet" in calls.read_text():
            break
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(60) == 0
    first, *said = calls.read_text().splitlines()
    assert first == "scontrol show hostnames node[1-2]"
    assert said[-2:] == ["stopped", "scontrol requeue 7"]
    step = said[: said.index("stopped")]
    assert {"torchrun", "--nnodes=2", "--rdzv-endpoint=node1:29500", "--max-restarts=3"} <= set(step)
    check_training(step[step.index("-m") :], slurm["RUNS"])
    assert step[-1] == "corpus.source=/data/*.parquet"


def test_what_ends_the_training_ends_the_job(slurm: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "bin" / "srun").write_text("#!/bin/bash\nexit 3\n")
    assert begun(slurm, RECIPE, "DIFF", "0").wait(60) == 3
    assert "requeue" not in Path(slurm["CALLS"]).read_text()
    job = begun(slurm, RECIPE, "DIFF")
    assert "a seed is needed" in job.communicate(timeout=60)[1] and job.returncode != 0


def test_the_manifest_fits_together() -> None:
    service, job = yaml.safe_load_all(MANIFEST.read_text())
    assert (service["apiVersion"], service["kind"]) == ("v1", "Service")
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    spec = job["spec"]
    pod = spec["template"]["spec"]
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"]
    # A policy for failures is taken with pods that are not started again in place alone.
    assert spec["podFailurePolicy"]["rules"] and pod["restartPolicy"] == "Never"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert service["spec"]["clusterIP"] == "None" and pod["subdomain"] == service["metadata"]["name"]
    (container,) = pod["containers"]
    command = container["command"]
    options = dict(part.removeprefix("--").split("=", 1) for part in command[1 : command.index("-m")])
    assert command[0] == "torchrun" and int(options["nnodes"]) == spec["completions"]
    assert int(options["nproc-per-node"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    host, _, port = options["rdzv-endpoint"].partition(":")
    assert host == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert int(port) == service["spec"]["ports"][0]["port"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    given = {entry["name"]: entry["value"] for entry in container["env"]}
    assert all(isinstance(value, str) for value in given.values())
    # The processes of one attempt must not meet at the addresses of the attempt before.
    assert given["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert "\nexport TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1\n" in SCRIPT.read_text()
    check_training(command[command.index("-m") :], "/runs")
    assert all(isinstance(part, str) for part in command)
