"""What exploration does before any update: does it find better images, and at what price?

    python benchmarks/exploration_alone.py [--steps 20] [--prompts 135] [--table docs/study.md]

Samples groups of four images of each prompt from the untouched emoji model, in every way of exploring and from the
same noise, and scores them. Prompts come in a random order, so that the first of them stand for all. Every prompt is
appended to ``--store`` as it is done; the same command goes on where it was stopped. Prints the differences to plain
sampling, paired by prompt, with bootstrap 95 % intervals over prompts; ``--table`` also puts them into a document.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from diffexp import assembly, prompts, rewards
from diffexp.config import Recipe
from diffexp.diversity import pairwise_diversity
from diffexp.exploration import ConstantGuidance, Exploration, StepGuidance, WordWeighting
from diffexp.markdown import replace_section
from diffexp.randomness import generator
from diffexp.rewards.base import score
from diffexp.rewards.features import encoder_of
from diffexp.rollout import Batch, Sampler
from diffexp.runs.reading import objects
from diffexp.runs.records import JsonLines
from diffexp.study.statistics import Estimate, bootstrap_mean

GROUP = 4  # images of a prompt, as many as the recipe emoji-ddpo samples
AT_ONCE = 4  # prompts
TRAINED, JUDGE = "emoji-alignment", "emoji-judge"
PLAIN = "plain"


def ways(sampler: Sampler, high: float) -> dict[str, Exploration]:
    """Every way of exploring. Thresholds are fractions of the steps: t > 900 is the first tenth."""
    found = {PLAIN: Exploration()}
    for low in (0.0, 1.0, 2.0):
        for threshold in (900, 800, 700):
            schedule = StepGuidance.over_first(1 - threshold / 1000, sampler.schedule.timesteps, low, high)
            found[f"w_l = {low:g}, t_thres = {threshold}"] = Exploration(schedule)
    found |= {f"words U(1, {top})": Exploration(words=WordWeighting(1.0, top)) for top in (1.1, 1.2, 1.5)}
    return found | {
        "DiffExp": Exploration(found["w_l = 1, t_thres = 900"].guidance, WordWeighting(1.0, 1.2)),
    }


def measured(recipe: Recipe, names: list[str], known: set[str]) -> Iterator[dict[str, object]]:
    """A record for each prompt that is not ``known``: rewards and diversity of its group, by way of exploring."""
    model = assembly.model(recipe)
    sampler = assembly.sampler(recipe, model)
    trained, judge = (rewards.load(name, model.device) for name in (TRAINED, JUDGE))
    encoder = encoder_of(judge)
    assert encoder is not None
    order = torch.randperm(len(names), generator=generator("exploration alone")).tolist()
    rows = [row for row in order if names[row] not in known]
    for chunk in (rows[start : start + AT_ONCE] for start in range(0, len(rows), AT_ONCE)):
        texts = [names[row] for row in chunk for _ in range(GROUP)]
        keys = [(0, "exploration alone", row, k) for row in chunk for k in range(GROUP)]
        batch = Batch(texts, model.encode(texts), ConstantGuidance(recipe.sampler.guidance), keys)
        records = [{"prompt": names[row], "steps": recipe.sampler.steps, "ways": {}} for row in chunk]
        for way, exploration in ways(sampler, recipe.sampler.guidance).items():
            images = sampler.rollout(batch.explored(exploration), len(texts)).images
            with torch.no_grad():
                values = {name: score(one, images, texts) for name, one in ((TRAINED, trained), (JUDGE, judge))}
                features = encoder(images)
            for k, record in enumerate(records):
                part = slice(k * GROUP, (k + 1) * GROUP)
                record["ways"][way] = {
                    **{name: [round(value, 4) for value in scores[part].tolist()] for name, scores in values.items()},
                    "diversity": round(pairwise_diversity(features[part].numpy()), 5),
                }
        yield from records


def figures(group: dict[str, object]) -> dict[str, float]:
    """What a group of images comes to."""
    values, judged = np.array(group[TRAINED]), np.array(group[JUDGE])
    return {
        "mean": values.mean(),
        f"best of {GROUP}": values.max(),
        "spread": values.std(ddof=1),
        "diversity": group["diversity"],
        "judge": judged.mean(),
        f"judge, best of {GROUP}": judged.max(),
    }


def table(records: list[dict[str, object]]) -> str:
    """The table: plain sampling as it is, every other way as the difference to it."""
    found = {way: [figures(record["ways"][way]) for record in records] for way in records[0]["ways"]}
    columns = list(found[PLAIN][0])
    lines = [f"| {len(records)} prompts | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    for way, groups in found.items():
        base = [dict.fromkeys(columns, 0.0)] * len(records) if way == PLAIN else found[PLAIN]
        cells = []
        for column in columns:
            gain = bootstrap_mean([own[column] - plain[column] for own, plain in zip(groups, base, strict=True)])
            cells.append(cell(gain, signed=way != PLAIN))
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(gain: Estimate, signed: bool) -> str:
    """A number; with its interval where it is a difference, in bold where that leaves 0 out."""
    if not signed:
        return f"{gain.value:.3f}"
    text = f"{gain.value:+.3f}"
    if gain.low is None or gain.high is None:
        return text
    clear = gain.low > 0 or gain.high < 0
    return f"{f'**{text}**' if clear else text} [{gain.low:+.3f}, {gain.high:+.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=135, help="how many of the 135, at most")
    parser.add_argument("--store", type=Path, default=Path("docs/study/exploration_alone.jsonl"))
    parser.add_argument("--table", type=Path, help="a document to put the table into")
    arguments = parser.parse_args()
    recipe = Recipe.load("emoji-ddpo", {"sampler.steps": arguments.steps, "device": "cpu"})
    names = list(prompts.load(recipe.prompts))
    arguments.store.parent.mkdir(parents=True, exist_ok=True)
    done = [record for record in objects(arguments.store) if record["steps"] == arguments.steps]
    store = JsonLines(arguments.store)
    if len(done) < arguments.prompts:
        for record in measured(recipe, names, {record["prompt"] for record in done}):
            store.append(record)
            done.append(record)
            print(f"{len(done)} of {arguments.prompts} prompts", flush=True)
            if len(done) >= arguments.prompts:
                break
    text = table(done)
    print(text)
    if arguments.table:
        replace_section(arguments.table, f"exploration_alone_{arguments.steps}", text)


if __name__ == "__main__":
    main()
