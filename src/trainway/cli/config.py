"""`trainway presets` and `trainway config`: what a run would be, before anything is run."""

from __future__ import annotations

from typing import Annotated

import typer

from trainway.cli.arguments import CONFIG_HELP, CONFIG_METAVAR, OPEN_ENDED, split_arguments
from trainway.cli.terminal import emit, emit_json, emit_table

presets_app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)
config_app = typer.Typer(help="Check and show a configuration.", no_args_is_help=True, rich_markup_mode=None)

Words = Annotated[
    list[str] | None, typer.Argument(metavar=CONFIG_METAVAR, help=CONFIG_HELP, show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def register(app: typer.Typer) -> None:
    app.add_typer(presets_app, name="presets")
    app.add_typer(config_app, name="config")


@presets_app.callback()
def list_presets(context: typer.Context, as_json: AsJson = False) -> None:
    """The shipped configurations; `presets show NAME` prints one.

    Example: trainway presets show m3_medium
    """
    if context.invoked_subcommand is not None:
        return
    from trainway.config.source import preset_descriptions

    descriptions = preset_descriptions()
    if as_json:
        emit_json(descriptions)
    else:
        emit_table(list(descriptions.items()))


@presets_app.command("show")
def show_preset(name: Annotated[str, typer.Argument(help="Name of the preset.")]) -> None:
    """Print a preset's YAML: a good start for a file of your own.

    Example: trainway presets show m3_medium > my.yaml
    """
    from trainway.config.source import preset_text

    emit(preset_text(name).rstrip())


@config_app.command("check", context_settings=OPEN_ENDED)
def check(words: Words = None, as_json: AsJson = False) -> None:
    """Validate a configuration and count the model's parameters.

    Example: trainway config check my.yaml optim.lr=1e-3
    """
    from trainway.config.load import load_config
    from trainway.planning.geometry import describe_plan, planned_ranks

    source, overrides = split_arguments(words or [])
    loaded = load_config(source, overrides)
    parameters = describe_plan(loaded.config, planned_ranks(loaded.config))["parameters"]
    if as_json:
        emit_json({"ok": True, "source": loaded.source_name, "parameters": parameters})
    else:
        emit(f"ok: {loaded.source_name}, {_size(parameters, loaded.config.model.path)}")


@config_app.command("show", context_settings=OPEN_ENDED)
def show(words: Words = None, as_json: AsJson = False) -> None:
    """Every setting, its value, and where that came from.

    Example: trainway config show runpod_2b optim.lr=1e-3 --seed 7
    """
    import json

    from trainway.config.load import load_config
    from trainway.config.resolved import flat_config
    from trainway.planning.geometry import describe_plan, planned_ranks

    source, overrides = split_arguments(words or [])
    loaded = load_config(source, overrides)
    if as_json:
        plan = describe_plan(loaded.config, planned_ranks(loaded.config))
        emit_json({"config": loaded.config.model_dump(mode="json"), "origins": loaded.origins, "plan": plan})
        return
    rows = [
        (
            key,
            "" if value is None else value if isinstance(value, str) else json.dumps(value),
            loaded.origins[key],
        )
        for key, value in flat_config(loaded.config).items()
    ]
    emit_table(rows, head=("setting", "value", "origin"))


@config_app.command("schema")
def schema() -> None:
    """Print the JSON schema of a configuration: every setting, its bounds, default and meaning.

    Example: trainway config schema > trainway.schema.json
    """
    from trainway.config.resolved import config_schema

    emit_json(config_schema())


def _size(parameters: dict[str, int] | None, model: str | None) -> str:
    """How large the model is, in words, as far as the plan knows."""
    if parameters is None:
        return (
            f"as many parameters as {model} has" if model else "as many parameters as its tokenizer asks for"
        )
    size = f"{parameters['total']:,} parameters"
    if "trainable" in parameters:
        share = 100 * parameters["trainable"] / parameters["total"]
        size += f", {parameters['trainable']:,} of them trained ({share:.2g} %)"
    return size
