"""The run directory and its files: what training, evaluation, the report and the command line share."""

from clearhead.extras import need

need("clearhead.runs", "hf")
