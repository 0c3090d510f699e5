"""The command line. Heavy libraries load only when a command needs them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from diffexp.errors import UserError, printable, refusal, writing
from diffexp.version import __version__


class Stopped(Exception):
    """Ctrl-C or SIGTERM, and what it left."""


class Commands(TyperGroup):
    """Hands Ctrl-C on to ``main``: typer would end without a word about how to go on."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            raise Stopped(str(stop) or "stopped") from stop


app = typer.Typer(
    name="diffexp",
    cls=Commands,
    help="Fine-tune text-to-image diffusion models on a reward, with DiffExp's exploration.",
    invoke_without_command=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich help costs a third of the start-up time
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeName = Annotated[str, typer.Argument(help="A shipped recipe's name, or a TOML file.", metavar="RECIPE")]
Target = Annotated[
    str, typer.Argument(help='A run folder, a diffusers folder, a hub id, or "emoji".', metavar="RUN_OR_MODEL")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting; may be repeated.")
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to write to.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def version(value: bool) -> None:
    if value:
        typer.echo(f"diffexp {__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    _: Annotated[bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def train(
    recipe: Annotated[
        str | None, typer.Argument(help="A shipped recipe's name, or a TOML file.", metavar="RECIPE")
    ] = None,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Run folder; default: runs/RECIPE-sSEED.")] = None,
    quiet: Quiet = False,
    processes: Annotated[int, typer.Option(min=1, help="Processes on this machine that share the work.")] = 1,
    like: Annotated[
        Path | None, typer.Option(help="Instead of a recipe: a LoRA file or run, whose recipe is repeated.")
    ] = None,
) -> None:
    """Fine-tune a model as a recipe says. The same command again continues an unfinished run.

    Example: diffexp train emoji-ddpo-diffexp --set iterations=20 --set seed=1 --out runs/first
    """
    from diffexp.commands import recipe_to_train

    chosen, name = recipe_to_train(recipe, like, overrides)
    folder = out or Path("runs") / f"{name}-s{chosen.seed}"
    if processes > 1:
        from diffexp.launch import launch

        source = [recipe] if recipe else ["--like", str(like)]
        changes = [part for change in overrides or [] for part in ("--set", change)]
        return launch(processes, ["train", *source, *changes, "--out", str(folder), *["--quiet"] * quiet])
    from diffexp.console import reporter
    from diffexp.training import train

    with writing("--out", folder):
        train(chosen, folder, reporter(quiet))


@app.command()
def evaluate(
    target: Target,
    prompts: Annotated[list[str] | None, typer.Option(help="Prompt set; may be repeated.")] = None,
    reward: Annotated[list[str] | None, typer.Option(help="Reward; may be repeated.")] = None,
    images: Annotated[int, typer.Option(min=1, help="Images a prompt.")] = 10,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Score a run or a model: exploration off, the same noise every time.

    Example: diffexp evaluate runs/first --prompts animal-activities-unseen --reward emoji-judge
    """
    from diffexp.commands import evaluate

    evaluate(target, prompts, reward, images, overrides, as_json)


@app.command()
def sample(
    target: Target,
    prompt: Annotated[list[str], typer.Option(help="Text to paint; may be repeated.")],
    out: Out,
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="Images a prompt.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Noise.")] = 0,
    explore: Annotated[bool, typer.Option("--explore", help="Sample as training explores.")] = False,
    overrides: Overrides = None,
) -> None:
    """Paint images with a run's LoRA, or with a model as it is.

    Example: diffexp sample runs/first --prompt "a dolphin riding a bike" --n 8 --out dolphins
    """
    from diffexp.commands import sample

    sample(target, prompt, n, seed, explore, overrides, out)


@app.command()
def explore(
    recipe: RecipeName,
    prompt: Annotated[str, typer.Option(help="Text to paint.")],
    out: Out,
    n: Annotated[int, typer.Option("--n", "-n", min=2, help="Images for each way of sampling.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Noise.")] = 0,
    overrides: Overrides = None,
) -> None:
    """Show what exploration does, as in the paper's Figure 3: grids, diversity and reward of each way of sampling.

    Example: diffexp explore emoji-ddpo-diffexp --prompt "a dolphin riding a bike" --out exploration
    """
    from diffexp.commands import explore

    explore(recipe, prompt, n, seed, overrides, out)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.", metavar="RUN...")],
    out: Out,
) -> None:
    """Compare runs: curves over queries with the spread over seeds, queries to the baseline's reward, image grids.

    Example: diffexp compare runs/ddpo-s0 runs/ddpo-s1 runs/diffexp-s0 runs/diffexp-s1 --out comparison
    """
    from diffexp.commands import compare

    compare(runs, out)


@app.command()
def reproduce(
    figure: Annotated[str, typer.Argument(help='A figure of the paper, such as 4 or 9a, or "all".', metavar="FIGURE")],
    scale: Annotated[str, typer.Option(help="The model: emoji, sd15 or sdxl.")] = "emoji",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each kind.")] = 3,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the runs and figures.")] = Path("runs/reproduce"),
    workers: Annotated[int | None, typer.Option(min=1, help="Runs at a time; default: one a core, or one GPU.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what there is to do, and how long.")] = False,
    overrides: Overrides = None,
) -> None:
    """Train what a figure of the paper needs and draw it. What is finished already is kept.

    Example: diffexp reproduce 4 --scale emoji --seeds 3 --dry-run
    """
    from rich.console import Console

    from diffexp.reproduce import reproduce
    from diffexp.toml import parse_override

    settings = dict(parse_override(text) for text in overrides or ())
    with writing("--out", out):
        reproduce(figure, scale, seeds, out, workers, dry_run, settings, Console())


@app.command("recipes")
def list_recipes() -> None:
    """List the shipped recipes. Example: diffexp recipes"""
    from diffexp.toml import shipped

    print_table(shipped())


@app.command("prompts")
def list_prompts() -> None:
    """List the prompt sets. Example: diffexp prompts"""
    from diffexp.prompts import available

    print_table(available())


@app.command()
def show(
    file: Annotated[Path, typer.Argument(help="A LoRA file, or a run folder.", metavar="FILE")],
    as_json: Json = False,
) -> None:
    """Show what a LoRA file says about itself: reward, queries, rank, alpha, keys, and the recipe that made it.

    Example: diffexp show runs/first/lora/pytorch_lora_weights.safetensors
    """
    from diffexp.lora_header import LoraHeader

    header = LoraHeader.read(file)
    typer.echo(header.to_json() if as_json else header.describe())


rewards = typer.Typer(rich_markup_mode=None, context_settings={"help_option_names": ["-h", "--help"]})
app.add_typer(rewards, name="rewards")


@rewards.callback(invoke_without_command=True)
def list_rewards(context: typer.Context) -> None:
    """List the rewards, or check what one needs. Example: diffexp rewards"""
    from diffexp.rewards import available

    if context.invoked_subcommand is None:
        print_table(available())


@rewards.command("check")
def check_reward(
    name: Annotated[str, typer.Argument(help="A reward, or a sum of some.", metavar="REWARD")],
) -> None:
    """Say what a reward downloads, from where, how big it is, under which licence, and what is missing here.

    Example: diffexp rewards check 2*hpsv2+aesthetic
    """
    from diffexp.rewards.needs import describe

    typer.echo(describe(name))


def print_table(rows: dict[str, str]) -> None:
    width = max(map(len, rows))
    for name, description in rows.items():
        typer.echo(f"{name:<{width}}  {description}")


def main() -> None:
    """The entry point: what the user can mend is one clear line a mistake and exit code 2, without a traceback."""
    try:
        sys.exit(app(prog_name="diffexp", standalone_mode=False) or 0)
    except UserError as error:
        complain(str(error))
    except Stopped as stop:
        typer.echo(f"{stop}: the same command again goes on from the newest checkpoint", err=True)
        sys.exit(130)
    except OSError as error:
        mistake = refusal(error, str(error.filename or "the disk"))
        if mistake is None:
            raise
        complain(str(mistake))
    except Exception as error:
        # what typer says about arguments; its versions share no public class for it
        if not hasattr(error, "format_message"):
            raise
        complain(about_arguments(error))


def complain(message: str) -> NoReturn:
    """Prints a line for every mistake, and exits."""
    for line in message.split("\n"):
        typer.echo(f"error: {printable(line)}", err=True)
    sys.exit(2)


def about_arguments(error: Any) -> str:
    """typer's message in a line of ours."""
    message = " ".join(error.format_message().split()).replace(". Did you", ": did you").rstrip(".")
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "diffexp"
    return f"{message[:1].lower()}{message[1:]}; see {command} --help"


if __name__ == "__main__":
    main()
