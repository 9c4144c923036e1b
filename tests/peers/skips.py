"""Common tests of transformers that these models do not pass, by name, each with its reason.

Three kinds: a default that chooses for each forward pass and names that never fall back (two tests), positions
without angles (three), and what is asked of decoders alone (one of encoders, seven of encoder-decoders). What LLaMA and
DiffLlama skip too (other modalities, experts, encoders, GPUs) the tests skip by themselves.

One more they skip by themselves: that of the frequencies looks for a module called "rotary_emb" that is made of a
configuration; tests/golden/test_rope_scalings.py compares frequencies with theirs.
"""

# For every class of tests here, the controls among them.
EVERYWHERE: dict[str, str] = {
    "test_generation_tester_mixin_inheritance": "the generation tests are not in the source distribution",
}

OURS: dict[str, str] = {
    "test_sdpa_can_dispatch_non_composite_models": (
        'the implementation by default is "clearhead", which chooses for each forward pass; the test wants "sdpa"'
    ),
    "test_eager_matches_sdpa_inference_24_fp32_pad_left_output_attentions": (
        "it asks sdpa, which has no maps, for maps: LLaMA leaves them out, here an implementation that is named and "
        "cannot do what is asked is an error"
    ),
}

ENCODERS: dict[str, str] = {
    "test_tp_generation": "an encoder does not generate; BERT and ModernBERT have no plan, so it skips theirs",
}

# Positions without angles have nothing to scale, and say so.
WITHOUT_ANGLES: dict[str, str] = {
    f"test_model_rope_scaling_from_config_{kind}": "there are no angles to scale, and a scaling is refused"
    for kind in ("0_linear", "1_dynamic", "2_yarn")
}

# T5 alone, a control: what transformers says of T5 by itself is not in the source distribution.
T5: dict[str, str] = {
    "test_model_base_model_prefix": 'its base model has a name, "transformer", that it does not have as a part',
}

# For encoder-decoders, T5 and BART among them.
SEQ2SEQ: dict[str, str] = {
    "test_training_overfit": "it generates from a prompt of the decoder alone, as for causal models",
}
OUR_SEQ2SEQ: dict[str, str] = dict.fromkeys(
    (
        "test_tp_forward_0",
        "test_tp_forward_1",
        "test_tp_backward",
        "test_tp_generation",
        "test_tp_plan_matches_params",
        "test_tied_head_has_a_tp_plan_entry",
    ),
    "not shared out over processes, as T5 and BART are not: the tests see the plan of the decoder inside",
)
