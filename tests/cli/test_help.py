"""What `--help` prints: every help text as written, and every option's default."""

import typer
import typer.core
import typer.main
from typer.testing import CliRunner

from clearhead.cli.main import app

# So wide that no help text is broken into lines.
WIDE = {"COLUMNS": "500", "NO_COLOR": "1"}


def verbs() -> dict[str, list[typer.core.TyperOption | typer.core.TyperArgument]]:
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    kinds = (typer.core.TyperOption, typer.core.TyperArgument)
    return {
        name: [parameter for parameter in command.params if isinstance(parameter, kinds)]
        for name, command in group.commands.items()
    }


def lines_of(verb: str) -> list[str]:
    done = CliRunner().invoke(app, [verb, "--help"], env=WIDE)
    assert done.exit_code == 0, done.output
    return done.output.splitlines()


def test_every_option_says_its_default() -> None:
    """Typer reads help texts as Rich markup, which swallows what stands in brackets."""
    for verb, parameters in verbs().items():
        lines = lines_of(verb)
        for option in parameters:
            # A flag is off and a repeated option empty until given.
            if isinstance(option, typer.core.TyperArgument) or option.is_flag or option.multiple:
                continue
            line = next(line for line in lines if f" {option.opts[0]} " in line)
            if option.required:
                assert "[required]" in line, f"{verb} {option.opts[0]}"
                continue
            shown = option.show_default
            default = f"({shown})" if isinstance(shown, str) else str(option.default)
            assert option.default is not None or isinstance(shown, str), f"{verb} {option.opts[0]}"
            assert f"[default: {default}]" in line, f"{verb} {option.opts[0]}: {line}"


def test_every_help_text_is_printed_as_written() -> None:
    for verb, parameters in verbs().items():
        text = "\n".join(lines_of(verb))
        for parameter in parameters:
            assert (parameter.help or "") in text, f"{verb} {parameter.name}: {parameter.help}"


def test_the_shell_completes_verbs() -> None:
    environment = {"_CLEARHEAD_COMPLETE": "complete_bash", "COMP_WORDS": "clearhead ev", "COMP_CWORD": "1"}
    done = CliRunner().invoke(app, [], prog_name="clearhead", env=environment)
    assert done.output.split() == ["evaluate"]
