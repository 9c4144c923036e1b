"""The figures of the CoCA paper (arXiv 2309.08646, version 3), to stand beside ours.

Its models: 350M parameters trained at 512 tokens, "CoCA" in its slack form, "dynamic NTK" with factor 4. 100 documents
of the PG-19 test set cut to 32,768 tokens, stride 512; 100 passkeys a length.
"""

from __future__ import annotations

from clearhead.analysis.sections import SectionTable

LENGTHS = ["512", "1024", "2048", "4096", "8192", "16k", "32k"]
CAPTION = "Another scale, corpus and tokenizer: for the direction only."

PERPLEXITY = SectionTable(
    "The CoCA paper's table 1: perplexity, models of 350M parameters trained at 512 tokens",
    ["model", *LENGTHS],
    [
        ["ALiBi", "18.69", "21.27", "28.20", "35.66", "37.03", "OOM", "OOM"],
        ["RoFormer", "19.66", "411.50", "3276.00", "3026.00", "3028.00", "inf", "inf"],
        ["RoFormer + dynamic NTK", "19.66", "22.30", "38.00", "75.75", "138.13", "370.75", "380.75"],
        ["CoCA", "20.11", "33.47", "69.06", "113.19", "157.38", "141.00", "171.63"],
        ["CoCA + dynamic NTK", "20.11", "20.81", "25.88", "34.16", "55.75", "89.31", "101.13"],
    ],
    f"{CAPTION} An earlier version of the paper reads about 385 for RoFormer + dynamic NTK at 8192.",
)

PASSKEY = SectionTable(
    "The CoCA paper's table 2: passkey accuracy, models of 350M parameters trained at 512 tokens, n = 100",
    ["model", *LENGTHS],
    [
        ["ALiBi", ".82", ".65", ".28", ".18", ".12", "OOM", "OOM"],
        ["RoFormer", ".99", ".53", ".30", ".18", ".04", ".02", ".04"],
        ["RoFormer + dynamic NTK", ".99", "1.00", ".95", ".70", ".41", ".16", ".06"],
        ["CoCA", "1.00", ".64", ".33", ".19", ".06", ".02", ".04"],
        ["CoCA + dynamic NTK", "1.00", "1.00", ".96", ".89", ".50", ".23", ".08"],
    ],
    f"{CAPTION} With n = 100 an accuracy near one half is known to ±0.10. The match rule is not stated.",
)

FACTORS = SectionTable(
    "The CoCA paper's table 3: slack CoCA with dynamic NTK by factor",
    ["measure and factor", *LENGTHS],
    [
        ["perplexity, 2", "20.11", "19.02", "24.92", "40.53", "68.38", "92.75", "103.44"],
        ["perplexity, 4", "20.11", "20.81", "25.88", "34.16", "55.75", "89.31", "101.13"],
        ["perplexity, 8", "20.11", "23.66", "29.05", "37.47", "55.5", "88.88", "111.38"],
        ["passkey, 2", "1.0", ".99", ".94", ".77", ".47", ".27", ".15"],
        ["passkey, 4", "1.0", "1.0", ".96", ".89", ".50", ".23", ".08"],
        ["passkey, 8", "1.0", ".98", ".99", ".85", ".50", ".11", ".02"],
    ],
    CAPTION,
)
