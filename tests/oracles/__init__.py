"""Reference mathematics in float64, written from the papers with loops and einsums.

Nothing here imports the implementation, and nothing here is fast: every function follows its equation as
printed, one batch row and one head at a time, so that a reader can check it against the paper. Gradients come
from autograd through these same lines.

Letters: B batch, H query heads, G key-value heads, L queries, S keys, D key width, E value width.
"""

from clearhead.testing import oracles as _shipped

# The oracles that third parties may use as well are shipped with the package and found here under the same names.
__path__ = [*__path__, *_shipped.__path__]
