"""``python -m tools.emoji build``: the emoji world from nothing to package data, stage after resumable stage."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

import torch

from tools.emoji import clip, evaluate, export, raters, scenes, sprites, tokenizer, unet, vae, xl
from tools.emoji.common import Budget

# Minutes of training a stage gets unless told otherwise; docs/emoji_world.md says what the shipped weights took.
MINUTES = {
    "vae": 30.0,
    "vae-decoder": 15.0,
    "alignment": 15.0,
    "alignment-vision": 15.0,
    "judge": 15.0,
    "unet": 60.0,
    "xl": 60.0,
}


def stages(budget: Callable[[str], Budget], device: str, threads: int | None) -> dict[str, Callable[[], object]]:
    """Every stage by name, in the order in which they depend on each other."""
    if threads:
        torch.set_num_threads(threads)
    return {
        "sprites": lambda: print(f"sprites: {len(sprites.sprites())} pictures"),
        "scenes": lambda: [print(f"scenes: {len(scenes.load(name)[0])} for {name}") for name in scenes.SPLITS],
        "tokenizer": lambda: print(f"tokenizer: {len(tokenizer.load())} tokens"),
        "vae": lambda: (vae.train(budget("vae"), device), vae.report(device)),
        "alignment": lambda: (clip.train("alignment", budget("alignment"), device), clip.report("alignment", device)),
        "unet": lambda: unet.train(budget("unet"), device),
        "vae-decoder": lambda: (vae.train(budget("vae-decoder"), device, decoder_only=True), vae.report(device)),
        "alignment-vision": lambda: (
            clip.sharpen(budget("alignment-vision"), device),
            clip.report("alignment", device),
        ),
        "judge": lambda: (clip.train("judge", budget("judge"), device), clip.report("judge", device)),
        "raters": lambda: raters.train(device),
        "export": lambda: export.export(),
        "evaluate": lambda: (evaluate.samples(device), evaluate.evaluate(device)),
        "xl": lambda: (xl.train(budget("xl"), device), xl.export(), xl.report()),
    }


def main() -> None:
    """Parse the command line and run the stages it names."""
    parser = argparse.ArgumentParser(prog="python -m tools.emoji", description=__doc__)
    parser.add_argument("command", choices=["build"])
    parser.add_argument("--stage", help="only this stage; all of them in turn by default")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, …")
    parser.add_argument("--threads", type=int, help="CPU threads; two processes of one thread beat one of two")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, help="training time of a stage in all, resumptions included")
    length.add_argument("--steps", type=int, help="training steps of a stage in all, resumptions included")
    arguments = parser.parse_args()

    if "WORLD_SIZE" in os.environ:  # under torchrun: the painter's batches are shared among the processes
        torch.distributed.init_process_group("gloo")

    def budget(stage: str) -> Budget:
        if arguments.steps:
            return Budget(steps=arguments.steps)
        return Budget(minutes=arguments.minutes or MINUTES[stage])

    table = stages(budget, arguments.device, arguments.threads)
    if arguments.stage and arguments.stage not in table:
        parser.error(f"unknown stage {arguments.stage!r}: one of {', '.join(table)}")
    for name, run in table.items():
        if arguments.stage in (None, name):
            run()


if __name__ == "__main__":
    main()
