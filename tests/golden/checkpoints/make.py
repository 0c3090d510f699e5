"""Makes the golden run of this version: a run that was stopped after two of three iterations.

    python tests/golden/checkpoints/make.py

Once for each released version; the folders of older versions are never made again, because they show that what those
versions have saved can still be continued. The model is the random one of ``tiny.py``; its place is written as MODEL.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from tiny import write_pipeline

from diffexp import __version__, train
from diffexp.config import Recipe
from diffexp.runs.names import CONFIG, RECORDS
from diffexp.terminal.reporter import Reporter

HERE = Path(__file__).parent


class Stop(Reporter):
    """Ends the run in its third iteration."""

    def stepped(self, record: object) -> None:
        if record["iteration"] == 3:
            raise KeyboardInterrupt


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        model, run, golden = Path(place) / "model", Path(place) / "run", HERE / __version__
        settings = {
            "iterations": 3,
            "samples": 2,
            "prompts": "text:a cat riding a bike",
            "reward": "2*jpeg-compressibility+jpeg-incompressibility",
            "device": "cpu",
            "trackers": [],
            "model": {"path": str(write_pipeline(model))},
            "lora": {"rank": 1, "targets": ["to_q"]},
            "sampler": {"steps": 2},
            "exploration": {"guidance": {"fraction": 0.5}, "words": {}},
            "evaluation": {"every": 2, "images": 1},
            "preview": {"images": 0},
            "checkpoint": {"every": 1, "keep_last": 1},
        }
        with suppress(KeyboardInterrupt):
            train(Recipe.parse(settings, "golden"), run, Stop())
        shutil.rmtree(golden, ignore_errors=True)
        shutil.copytree(run / "checkpoints", golden / "checkpoints")
        for name in RECORDS:
            shutil.copyfile(run / name, golden / name)
        config = (run / CONFIG).read_text(encoding="utf-8")
        (golden / CONFIG).write_text(config.replace(str(model), "MODEL"), encoding="utf-8")
    print(sum(file.stat().st_size for file in golden.rglob("*") if file.is_file()), "bytes in", golden)


if __name__ == "__main__":
    main()
