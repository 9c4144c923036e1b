"""The sentences with which the choice of a backend refuses what none but some can do."""

TAKES_NUMBERS = (
    "it takes keys and values as numbers, not as the codes of a quantised cache; cpu and blocks take those"
)
LEAVES_NOTHING_OUT = "it leaves no blocks of keys out: block_sparse is for the backend cpu alone"
SEES_ITS_PART = "under context parallelism it sees the part of a row that is here: sdpa alone is shared out"
