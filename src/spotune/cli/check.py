"""``spotune check``."""

from collections.abc import Mapping
from typing import Any

import click

from spotune.cli.options import config_options, format_option, open_workspace


@click.command()
@click.argument("config", required=False)
@config_options
@click.option("--infra", default="", metavar="NAME", help="Also ask SkyPilot how NAME stands: takes seconds.")
@format_option()
def check(
    config: str | None,
    profile: str,
    overrides: tuple[str, ...],
    allow_env: tuple[str, ...],
    infra: str,
    output: str,
) -> None:
    """Check CONFIG, its data and its model as far as that goes without running anything.

    Prints one line on stderr for each fault of CONFIG and its profiles, and exits with 2.

    Without CONFIG: this machine and project: settings, bucket, infrastructures, GPUs, and how SkyPilot stands where
    the settings name an infrastructure of its.
    """
    from spotune.cli.options import print_json
    from spotune.contracts.errors import InfraError
    from spotune.launch.survey import survey_config, survey_machine

    if not config and (profile or overrides):
        raise click.UsageError("--profile and --set are of a CONFIG, and there is none.")
    workspace, silent = open_workspace(), None
    found = survey_config(config, profile, overrides, workspace, allow_env) if config else survey_machine(workspace)
    if infra or not config:
        from spotune.launch.survey import survey_place

        try:
            found |= survey_place(workspace, infra)
        except InfraError as error:  # what was found without it is shown all the same
            silent = error
    print_json(found) if output == "json" else click.echo(_text(found))
    if silent:
        raise silent


def _text(found: Mapping[str, Any]) -> str:
    values = {name: ", ".join(map(str, value)) if isinstance(value, list) else value for name, value in found.items()}
    return "\n".join(f"{name:<16}{'-' if value in ('', None) else value}" for name, value in values.items())
