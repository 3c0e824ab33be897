"""``spotune check``."""

import click

from spotune.cli.options import config_options, format_option, open_workspace


@click.command()
@click.argument("config", required=False)
@config_options
@click.option("--infra", default="", metavar="NAME", help="Also ask SkyPilot how NAME stands: takes seconds.")
@format_option()
def check(config: str | None, profile: str, overrides: tuple[str, ...], infra: str, output: str) -> None:
    """Check CONFIG, its data and its model as far as that goes without running anything.

    Without CONFIG: this machine and project: settings, bucket, infrastructures, GPUs, and how SkyPilot stands where
    the settings name an infrastructure of its.
    """
    from spotune.cli.options import print_json
    from spotune.launch.survey import survey_config, survey_machine

    workspace = open_workspace()
    found = survey_config(config, profile, overrides, workspace.env.cache) if config else survey_machine(workspace)
    if infra or not config:
        from spotune.launch.survey import survey_place

        found |= survey_place(workspace, infra)
    if output == "json":
        print_json(found)
        return
    for name, value in found.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        click.echo(f"{name:<16}{text or '-'}")
