"""Common tests of transformers that do not apply to these models, by name, each with its reason."""

# For every class of tests here, the controls among them.
EVERYWHERE: dict[str, str] = {
    "test_generation_tester_mixin_inheritance": "the generation tests are not in the source distribution",
}

OURS: dict[str, str] = {}
