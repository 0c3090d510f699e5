"""The commands that say what there is: recipes, prompt sets, rewards, settings, and this machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from diffexp import completion
from diffexp.cli_kinds import HELP, Computing

lists = typer.Typer(rich_markup_mode=None)
recipes = typer.Typer(rich_markup_mode=None, context_settings=HELP)
rewards = typer.Typer(rich_markup_mode=None, context_settings=HELP)
lists.add_typer(recipes, name="recipes")
lists.add_typer(rewards, name="rewards")


@recipes.callback(invoke_without_command=True)
def list_recipes(context: typer.Context) -> None:
    """List the shipped recipes, or copy one. Example: diffexp recipes"""
    from diffexp.toml import shipped

    if context.invoked_subcommand is None:
        print_table(shipped())


@recipes.command("copy")
def copy(
    name: Annotated[str, typer.Argument(help="A shipped recipe.", metavar="NAME", autocompletion=completion.shipped)],
    file: Annotated[Path | None, typer.Argument(help="The file to make; default: NAME.toml.", metavar="[FILE]")] = None,
) -> None:
    """Copy a recipe to change it, with the schema by which editors complete and check it.

    Example: diffexp recipes copy sd15-8gb mine.toml
    """
    from diffexp.schema import FILE, copy_recipe

    made = copy_recipe(name, file or Path(f"{name}.toml"))
    typer.echo(f"{made}, and {FILE} beside it for editors; diffexp train {made} uses it")


@lists.command("prompts")
def list_prompts(
    name: Annotated[
        str | None,
        typer.Argument(help="A prompt set, or a file of prompts.", metavar="NAME", autocompletion=completion.prompts),
    ] = None,
) -> None:
    """List the prompt sets, or print the prompts of one, one a line.

    Example: diffexp prompts animal-activities-unseen
    """
    from diffexp.errors import printable
    from diffexp.prompts import available, load

    if name is None:
        return print_table(available())
    # a prompt from .jsonl or a table may have line breaks of its own
    typer.echo("\n".join(printable(" ".join(prompt.split())) for prompt in load(name)))


@rewards.callback(invoke_without_command=True)
def list_rewards(context: typer.Context) -> None:
    """List the rewards, or check what one needs. Example: diffexp rewards"""
    from diffexp.rewards import available

    if context.invoked_subcommand is None:
        print_table(available())


@rewards.command("check")
def check_reward(
    name: Annotated[
        str,
        typer.Argument(help="A reward, or a sum of some.", metavar="REWARD", autocompletion=completion.rewards),
    ],
) -> None:
    """Say what a reward downloads, from where, how big it is, under which licence, and what is missing here.

    Example: diffexp rewards check 2*hpsv2+aesthetic
    """
    from diffexp.rewards.needs import describe

    typer.echo(describe(name))


@lists.command("config-schema")
def config_schema() -> None:
    """Print the JSON Schema of recipes, by which editors complete and check them.

    Example: diffexp config-schema > recipe.schema.json
    """
    from diffexp.schema import to_json

    typer.echo(to_json(), nl=False)


@lists.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")] = False,
) -> None:
    """Say what is installed, what is missing, and what this machine can run: for bug reports.

    Example: diffexp doctor
    """
    from diffexp.doctor import describe, examine

    found = examine()
    typer.echo(json.dumps(found, indent=1) if as_json else describe(found))


@lists.command(cls=Computing)
def bench(
    recipe: Annotated[
        str | None,
        typer.Argument(
            help="A recipe; default: one of the architecture.", metavar="[RECIPE]", autocompletion=completion.recipes
        ),
    ] = None,
    arch: Annotated[
        str | None, typer.Option(help="The model's architecture: emoji, emoji-xl, sd15, sd21 or sdxl.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Where it computes: auto, cpu, cuda, cuda:1, mps.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")] = False,
) -> None:
    """Measure a few steps here, without a download, and tell what a recipe would cost: speed, time, memory.

    Example: diffexp bench sd15-ddpo-diffexp --device cuda
    """
    from diffexp.bench import bench
    from diffexp.config import Recipe
    from diffexp.toml import parse_overrides

    name = recipe or {"sd15": "sd15-ddpo", "sd21": "sd15-ddpo", "sdxl": "sdxl-alignprop"}.get(arch or "", "emoji-ddpo")
    changes = parse_overrides(overrides) | ({"device": device} if device else {})
    found = bench(Recipe.load(name, changes), name, arch)
    typer.echo(json.dumps(asdict(found), indent=1) if as_json else "\n".join(found.lines()))


def print_table(rows: Mapping[str, str]) -> None:
    width = max(map(len, rows))
    for name, description in rows.items():
        typer.echo(f"{name:<{width}}  {description}")
