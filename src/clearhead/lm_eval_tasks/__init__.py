"""Tasks for lm-evaluation-harness; `INCLUDE_PATH` is where it finds them (`clearhead evaluate --lm-eval-path`)."""

from clearhead.evals.external.lm_eval import INCLUDE_PATH

__all__ = ["INCLUDE_PATH"]
