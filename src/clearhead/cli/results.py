"""The results of a run as a table in the terminal."""

from pathlib import Path


def print_results(run_dir: Path) -> None:
    """Print what `summary.json` says."""
