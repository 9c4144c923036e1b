"""Reference mathematics in float64, written from the papers with loops and einsums.

Nothing here imports the implementation, and nothing here is fast: every function follows its equation as
printed, one batch row and one head at a time, so that a reader can check it against the paper. Gradients come
from autograd through these same lines.

Letters: B batch, H query heads, G key-value heads, L queries, S keys, D key width, E value width.
"""
