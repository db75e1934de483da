"""From cases to preference pairs: sample, judge, select, report, check. Files between the steps; each step resumes."""

import importlib

import click

from mede2.trainer.commandline import fail

COMMANDS = {  # each module has its click command under the name `command` and imports what is slow only when called
    "demo-cases": "demo_cases",
    "demonstrations": "demonstrations",
    "sample": "sample",
    "judge": "judge",
    "select": "select",
    "corrupt": "corrupt",
    "report": "report",
    "check": "check",
}


class Steps(click.Group):
    """The subcommands, each imported when it is named; what a user can mend becomes one line."""

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
        except ModuleNotFoundError as error:
            if str(error.name).startswith("mede2"):
                raise
            fail(f"{error.name} is not installed; pip install 'mede2[pairs]' installs all that these steps need")


main = Steps("pairs", help=__doc__)

if __name__ == "__main__":
    main()
