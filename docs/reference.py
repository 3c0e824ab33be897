"""Writes docs/reference/cli.md from the commands' own help: ``python docs/reference.py`` (make docs)."""

from collections.abc import Iterator
from pathlib import Path

import click

from spotune.cli import main

HEAD = "# Every verb\n\nWritten by `make docs` from the commands' own `--help`; a test holds the two together.\n"
WIDTH = 100


def reference() -> str:
    """The whole page, one section a verb, subcommands behind their group."""
    sections = (f"\n## {name}\n\n```\n{text}\n```\n" for name, text in helps(main, None, "spotune"))
    return HEAD + "".join(sections)


def helps(command: click.Command, parent: click.Context | None, name: str) -> Iterator[tuple[str, str]]:
    """(full name, help text) of a command and of all below it."""
    settings = {**command.context_settings, "terminal_width": WIDTH, "max_content_width": WIDTH}
    context = click.Context(command, parent=parent, info_name=name, **settings)
    yield context.command_path, command.get_help(context)
    if isinstance(command, click.Group):
        for below in command.list_commands(context):
            found = command.get_command(context, below)
            if found and not found.hidden:
                yield from helps(found, context, below)


if __name__ == "__main__":
    (Path(__file__).with_name("reference") / "cli.md").write_text(reference())
