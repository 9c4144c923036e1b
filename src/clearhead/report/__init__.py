"""The report: one self-contained page made of a run's files, and model cards."""

from clearhead.extras import need

need("clearhead.report", "report")
