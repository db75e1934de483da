"""From cases to preference pairs: sample, judge, select, report, check. Files between the steps; each step resumes."""

import importlib

import click

from mede2.trainer.commandline import fail

COMMANDS = {  # each module has its click command under the name `command` and imports what is slow only when called
    "demo-cases": "demo_cases",
    "sample": "sample",
    "judge": "judge",
    "check": "check",
    "demonstrations": "demonstrations",
}


class Steps(click.Group):
    """The subcommands, each imported when it is named; a ValueError becomes one line."""

    def list_commands(self, _) -> list[str]:
        return list(COMMANDS)

    def get_command(self, _, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        return importlib.import_module(f"mede2.trainer.preference.{COMMANDS[name]}").command

    def invoke(self, context: click.Context):
        try:
            return super().invoke(context)
        except ValueError as error:
            fail(str(error))


main = Steps("pairs", help=__doc__)

if __name__ == "__main__":
    main()
