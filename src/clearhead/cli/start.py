"""Entry point of the command `clearhead`: it says which extra is missing before anything of it is imported."""

import sys

from clearhead.extras import VERBS, MissingExtra, need


def main() -> None:
    """Run the verb in `sys.argv`; without the packages it needs, one sentence and exit code 2."""
    verb = next((argument for argument in sys.argv[1:] if not argument.startswith("-")), "")
    asks_for_help = not verb or {"-h", "--help"} & {*sys.argv[1:]}
    try:
        need(f"clearhead {verb}".rstrip(), "hf" if asks_for_help else VERBS.get(verb, "hf"))
    except MissingExtra as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    from clearhead.cli.main import main as run

    run()
