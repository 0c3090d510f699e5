"""The command line. Heavy libraries load only when a command needs them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from diffexp import completion
from diffexp.cli_kinds import HELP, Commands, Computing, Stopped
from diffexp.cli_lists import lists
from diffexp.control import REQUESTS, ask
from diffexp.errors import GOES_ON, Lost, UserError, cut, printable, refusal, writing
from diffexp.version import __version__

app = typer.Typer(
    name="diffexp",
    cls=Commands,
    help="Fine-tune text-to-image diffusion models on a reward, with DiffExp's exploration.",
    invoke_without_command=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich help costs a third of the start-up time
    context_settings=HELP,
)
app.add_typer(lists)

A_RECIPE = typer.Argument(
    help="A shipped recipe's name, or a TOML file.", metavar="RECIPE", autocompletion=completion.recipes
)
RecipeName = Annotated[str, A_RECIPE]
Target = Annotated[
    str,
    typer.Argument(
        help='A run folder, a diffusers folder, a hub id, "emoji" or "emoji-xl".',
        metavar="RUN_OR_MODEL",
        autocompletion=completion.runs,
    ),
]
RunFolder = Annotated[Path, typer.Argument(help="A run folder.", metavar="RUN", autocompletion=completion.runs)]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a setting; may be repeated.",
        autocompletion=completion.settings,
    ),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to write to.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only warnings and errors.")]
JsonLines = Annotated[bool, typer.Option("--json", help="Say everything as JSON, one object a line.")]
Processes = Annotated[int, typer.Option(min=1, help="Processes on this machine that share the work.")]
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


@app.command(cls=Computing)
def train(
    recipe: Annotated[str | None, A_RECIPE] = None,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Run folder; default: runs/RECIPE-sSEED.")] = None,
    quiet: Quiet = False,
    as_json: JsonLines = False,
    processes: Processes = 1,
    like: Annotated[
        Path | None, typer.Option(help="Instead of a recipe: a LoRA file or run, whose recipe is repeated.")
    ] = None,
) -> None:
    """Fine-tune a model as a recipe says. The same command again continues an unfinished run.

    Example: diffexp train emoji-ddpo-diffexp --set iterations=20 --set seed=1 --out runs/first
    """
    from diffexp.commands import begin, recipe_to_train

    chosen, name = recipe_to_train(recipe, like, overrides)
    folder = out or Path("runs") / f"{name}-s{chosen.seed}"
    source = [recipe] if recipe else ["--like", str(like)]
    changes = [part for change in overrides or [] for part in ("--set", change)]
    with writing("--out", folder):
        begin(chosen, folder, ["train", *source, *changes, "--out", str(folder)], processes, quiet, as_json)


@app.command(cls=Computing)
def resume(run: RunFolder, quiet: Quiet = False, as_json: JsonLines = False, processes: Processes = 1) -> None:
    """Continue a run exactly where it was left, by the recipe in its folder. What is finished stays as it is.

    Example: diffexp resume runs/first
    """
    from diffexp.commands import resume

    with writing("RUN", run):
        resume(run, processes, quiet, as_json)


@app.command(cls=Computing)
def evaluate(
    target: Target,
    prompts: Annotated[
        list[str] | None, typer.Option(help="Prompt set; may be repeated.", autocompletion=completion.prompts)
    ] = None,
    reward: Annotated[
        list[str] | None, typer.Option(help="Reward; may be repeated.", autocompletion=completion.rewards)
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Images a prompt.")] = 10,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Score a run or a model: exploration off, the same noise every time.

    Example: diffexp evaluate runs/first --prompts animal-activities-unseen --reward emoji-judge
    """
    from diffexp.commands import evaluate

    evaluate(target, prompts, reward, images, overrides, as_json)


@app.command(cls=Computing)
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


@app.command(cls=Computing)
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


@app.command(cls=Computing)
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
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.", metavar="RUN...")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File to write; default: report.html in the run's folder.")
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Serve it on this machine, anew while the runs train.")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of --watch; 0: any free one.")] = 8421,
) -> None:
    """Write runs as one HTML file that needs no network: curves, images over time, exploration, recipe.

    Example: diffexp report runs/first; diffexp report runs/first --watch
    """
    from diffexp.report import write

    if not watch:
        return typer.echo(f"report in {write(runs, out)}")
    if out:
        raise UserError("--out and --watch: a report is either written or served; leave one out")
    from diffexp.report.watch import serve

    with serve(runs, port) as server:
        typer.echo(f"{server.url} shows the runs as they train; Ctrl-C ends it")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            typer.echo("")


@app.command()
def reproduce(
    figure: Annotated[
        str,
        typer.Argument(
            help='A figure of the paper, such as 4 or 9a; "all" of them, with tuning and controls; or "ours".',
            metavar="FIGURE",
        ),
    ],
    scale: Annotated[str, typer.Option(help="The model: emoji, sd15 or sdxl.")] = "emoji",
    seeds: Annotated[int | None, typer.Option(min=1, help="Runs of each kind; default: 5 or 3, as planned.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the runs and figures.")] = Path("runs/reproduce"),
    workers: Annotated[int | None, typer.Option(min=1, help="Runs at a time; default: one a core or GPU.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what there is to do, and how long.")] = False,
    source: Annotated[
        Path | None, typer.Option("--from", help="Train nothing: draw what this store, or folder of runs, has.")
    ] = None,
    store: Annotated[
        Path | None, typer.Option(help="Keep runs' numbers in this folder, train none that it has, write STORE.md.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Train what a figure of the paper needs and draw it. What is finished already is kept.

    Example: diffexp reproduce 4 --scale emoji --seeds 3 --dry-run
    """
    from diffexp.study.paper import chosen
    from diffexp.toml import parse_overrides

    chosen(figure, scale)  # a wrong name is refused at once: the libraries below take seconds to load
    settings = parse_overrides(overrides)

    from rich.console import Console

    from diffexp.study.reproduce import reproduce

    with writing("--out", out):
        reproduce(figure, scale, seeds, out, workers, dry_run, settings, Console(), source, store)


@app.command()
def show(
    file: Annotated[Path, typer.Argument(help="A LoRA file, or a run folder.", metavar="FILE")],
    as_json: Json = False,
) -> None:
    """Show what a LoRA file says about itself: reward, queries, rank, alpha, keys, and the recipe that made it.

    Example: diffexp show runs/first/lora/pytorch_lora_weights.safetensors
    """
    from diffexp.sharing.lora_header import LoraHeader

    header = LoraHeader.read(file)
    typer.echo(header.to_json() if as_json else header.describe())


@app.command()
def ctl(
    run: RunFolder,
    request: Annotated[
        str,
        typer.Argument(
            help="sample: paint the previews; save: a checkpoint and the LoRA; stop: save and end.",
            metavar="sample|save|stop",
            autocompletion=lambda: list(REQUESTS),
        ),
    ],
) -> None:
    """Ask a run that trains for something, from a second shell. It does so after the current iteration.

    Example: diffexp ctl runs/first sample
    """
    typer.echo(f"asked {run}: after the current iteration {ask(run, request)}")


@app.command()
def download(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Fetch the model and the rewards that a recipe needs, for a machine without internet.

    Example: diffexp download sd15-alignprop-diffexp --set reward=2*hpsv2+aesthetic
    """
    from diffexp.commands import read_recipe
    from diffexp.download import download

    download(read_recipe(recipe, overrides), typer.echo)


@app.command()
def push(
    run: RunFolder,
    to: Annotated[str, typer.Option(help="The repository on the hub, as user/name; made if need be.")],
    private: Annotated[bool, typer.Option("--private", help="Only for yourself.")] = False,
) -> None:
    """Publish a run's LoRA files, card and images on the Hugging Face hub. Nothing is ever published without this.

    Example: diffexp push runs/first --to me/pretty-dolphins --private
    """
    from diffexp.sharing.push import push

    typer.echo(push(run, to, private))


@app.command("serve-reward")
def serve_reward(
    reward: Annotated[
        str,
        typer.Argument(
            help="A reward, or your own as file.py:function.", metavar="REWARD", autocompletion=completion.rewards
        ),
    ],
    host: Annotated[str, typer.Option(help="Address to listen at; any but loopback needs a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: any free one.")] = 8420,
    token_file: Annotated[
        Path | None, typer.Option(help="File with the token to ask for; default: DIFFEXP_REWARD_TOKEN, if set.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where it computes: auto, cpu, cuda, cuda:1, mps.")] = "auto",
    batch: Annotated[int, typer.Option(min=1, max=4096, help="Images scored at once.")] = 64,
) -> None:
    """Score images for runs on other devices or machines, whose recipes say reward = "http://HOST:PORT".

    Example: diffexp serve-reward hpsv2 --device cuda:1
    """
    from diffexp.rewards.server import serve

    serve(reward, host, port, token_file, device, batch)


def main() -> None:
    """The entry point: what the user can mend is one clear line a mistake and exit code 2, without a traceback."""
    try:
        sys.exit(app(prog_name="diffexp", standalone_mode=False) or 0)
    except UserError as error:
        complain(str(error))
    except Lost as error:
        typer.echo(f"error: {error}; {GOES_ON}", err=True)
        sys.exit(Lost.exit_code)
    except (Stopped, KeyboardInterrupt) as stop:
        typer.echo(f"{str(stop) or 'stopped'}: {GOES_ON}", err=True)
        sys.exit(130)
    except OSError as error:
        mistake = refusal(error, cut(str(error.filename or "the disk")))
        if mistake is None:
            raise
        complain(str(mistake))
    except Exception as error:
        # what typer says about arguments; its versions share no public class for it
        if hasattr(error, "format_message"):
            complain(about_arguments(error))
        from diffexp.memory import out_of_memory

        if not out_of_memory(error):
            raise
        complain(
            f"out of memory ({cut(str(error))}): take model.precision = 'bf16', lower rollout.batch, update.batch or "
            f"sampler.size, or free memory of other programs; {GOES_ON}"
        )


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
