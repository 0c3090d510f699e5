"""The charts of a report: rewards, what training saw of them, diversity, guidance, speed and memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from diffexp.report.charts import Chart, Line, Values, colour, dash, joined, over_seeds
from diffexp.report.sources import Material, Source
from diffexp.runs.reading import Measure, is_number
from diffexp.sharing.lora_header import without_paths
from diffexp.study.comparison import Arm

Points = tuple[list[float], list[float]]
TIMESTEPS = 1000

MEASURE_COLOURS = ("held-1", "held-2", "held-3", "held-4")


def reward_charts(material: Material) -> list[Chart]:
    """A chart for every prompt set and reward that was evaluated."""
    charts = []
    for k, measure in enumerate(material.measures):
        tags = tags_of(material.first, measure)
        title = str(without_paths(measure.reward))
        note = f"on {without_paths(measure.prompts)}"
        points = by_arm(material, lambda source, m=measure: column(source, m, "mean"))
        charts.append(chart(material, points, f"reward-{k}", title, "queries", note=note, tags=tags))
    return [one for one in charts if one]


def training_chart(material: Material) -> Chart | None:
    """What the samples that training learns from earned, exploration and all."""
    points = by_arm(material, lambda source: metric(source, "reward_mean"))
    note = "Mean reward of the samples that each iteration learns from, exploration included."
    return chart(material, points, "training", "Training samples", "queries", note=note, mark=exploration_end(material))


def exploration_end(material: Material) -> tuple[float, str] | None:
    """The queries after which exploration is over, where all arms that explore agree on it."""
    ends = set()
    for arm in material.arms:
        if arm.first.explores:
            source = material.of(arm.first)
            ends.add(source.queries_at(source.last_exploring))
    return (float(ends.pop()), "exploration ends") if len(ends) == 1 else None


def gain_charts(material: Material) -> list[Chart]:
    """For every arm, everything that was evaluated on one scale: the gain in standard deviations at the start."""
    charts: list[Chart] = []
    for k, arm in enumerate(material.arms):
        found = [(measure, gain_points(material, arm, measure)) for measure in material.measures]
        kept = [(measure, over_seeds(arm, points)) for measure, points in found if points]
        if not any(len(xs) > 1 for _, (xs, _) in kept):
            continue
        xs, rows = joined([curve for _, curve in kept])
        lines = [measure_line(material, measure, values) for (measure, _), values in zip(kept, rows, strict=True)]
        note = "Solid: prompts that training saw. Dashed: prompts that it did not." if has_unseen(material) else ""
        title = arm.label if len(material.arms) > 1 else "Gain over the untouched model"
        charts.append(Chart(f"gain-{k}", title, "queries", xs, lines, note, unit=" sd", zero=True, digits=3))
    every = [value for one in charts for value in one.extremes()]
    limits = (min(every, default=0), max(every, default=0))  # side by side, the same height is the same gain
    return [replace(one, limits=limits) for one in charts]


def gain_points(material: Material, arm: Arm, measure: Measure) -> list[Points]:
    """Of each seed: queries, and the gain in standard deviations of the untouched model's images."""
    found = []
    for source in material.members(arm):
        lines = source.run.scores.get(measure, ())
        deviation = lines[0].get("std") if lines else None
        if deviation:
            start = lines[0]["mean"]
            found.append(([float(line["queries"]) for line in lines], [(s["mean"] - start) / deviation for s in lines]))
    return found


def measure_line(material: Material, measure: Measure, rows: Sequence[Values]) -> Line:
    """A line whose colour tells the reward, and whose style tells seen prompts from unseen ones."""
    rewards = list(dict.fromkeys(m.reward for m in material.measures if material.first.run.held_out(m)))
    held_out = material.first.run.held_out(measure)
    hue = MEASURE_COLOURS[rewards.index(measure.reward) % len(MEASURE_COLOURS)] if held_out else "trained"
    unseen = not material.first.seen(measure)
    label = f"{without_paths(measure.reward)}, {'held out' if held_out else 'trained'}"
    label += f", {without_paths(measure.prompts)}" if len({m.prompts for m in material.measures}) > 1 else ""
    return line(label, hue, rows, 1 if unseen else 0)


def diversity_charts(material: Material) -> list[Chart]:
    """How different the evaluated images are, for every prompt set in which that was measured."""
    charts = []
    for k, (measure, points) in enumerate(by_set(material, "diversity")):
        tags, title = tags_of(material.first, measure)[:1], str(without_paths(measure.prompts))
        charts.append(chart(material, points, f"diversity-{k}", title, "queries", tags=tags, digits=3))
    return [one for one in charts if one]


def drift_charts(material: Material) -> list[Chart]:
    """How far the model has moved from the untouched one, on every prompt set where that was measured."""
    charts = []
    for k, (measure, points) in enumerate(by_set(material, "kl_to_base")):
        title, note = "KL divergence to the untouched model", f"on {without_paths(measure.prompts)}"
        charts.append(chart(material, points, f"drift-{k}", title, "queries", note=note, zero=True, digits=3))
    return [one for one in charts if one]


def cost_charts(material: Material) -> list[Chart]:
    """Seconds and memory of every iteration."""
    seconds = by_arm(material, lambda source: metric(source, "seconds", "iteration"))
    memory = by_arm(material, lambda source: metric(source, "memory_gib", "iteration"))
    found = [
        chart(material, seconds, "seconds", "Seconds an iteration", "iteration", unit=" s", zero=True, digits=3),
        chart(material, memory, "memory", "Peak memory", "iteration", unit=" GiB", zero=True, digits=3),
    ]
    return [one for one in found if one]


def guidance_chart(material: Material) -> Chart | None:
    """w(t) of exploration beside that of ordinary sampling, from noise (t = 1000) to the image (t = 0)."""
    arms = material.arms
    exploring = [(arm, changes(material.of(arm.first))) for arm in arms if "guidance" in arm.first.strategies]
    if not exploring:
        return None
    plain = float(material.of(exploring[0][0].first).setting("sampler", "guidance") or 0)
    ends = {0.0, float(TIMESTEPS)}
    xs = sorted(ends | {float(TIMESTEPS - t) for _, found in exploring for t, _ in found[1:]})
    lines = [line("without exploration", "plain-1", [[plain] * len(xs)], 1)]
    for arm, found in exploring:
        scales = [scale_at(found, TIMESTEPS - x) for x in xs]
        lines.append(line(arm.label, colour(arms, arm), [scales], dash(arms, arm)))
    return Chart("guidance", "Guidance scale w(t)", "timestep", xs, lines, stepped=True, zero=True, digits=2)


def changes(source: Source) -> list[tuple[float, float]]:
    """The timesteps from which on w(t) has another value: as recorded, else as the recipe says."""
    for record in source.exploration:
        if record.get("guidance"):
            return [(float(t), float(w)) for t, w in record["guidance"]]
    low, high = source.setting("exploration", "guidance", "low"), source.setting("sampler", "guidance")
    threshold, part = (source.setting("exploration", "guidance", key) for key in ("threshold", "fraction"))
    turn = (1 - part) * TIMESTEPS if part is not None else 900 if threshold is None else threshold
    return [(float(TIMESTEPS), float(low)), (float(turn), float(high))]


def scale_at(found: Sequence[tuple[float, float]], t: float) -> float:
    """w(t), which holds from each change towards the image."""
    return next((w for start, w in reversed(found) if t <= start), found[0][1])


def tags_of(source: Source, measure: Measure) -> list[str]:
    """What to know of a measure: whether training saw its prompts and its reward."""
    prompts = "seen prompts" if source.seen(measure) else "unseen prompts"
    return [prompts, "held-out reward"] if source.run.held_out(measure) else [prompts]


def has_unseen(material: Material) -> bool:
    """Whether prompts were evaluated that training did not see."""
    return any(not material.first.seen(measure) for measure in material.measures)


def column(source: Source, measure: Measure, key: str) -> Points:
    """Queries, and one figure of a measure's evaluations."""
    lines = [entry for entry in source.run.scores.get(measure, ()) if is_number(entry.get(key))]
    return [float(entry["queries"]) for entry in lines], [float(entry[key]) for entry in lines]


def metric(source: Source, key: str, x: str = "queries") -> Points:
    """x, and one figure of the iterations."""
    lines = [entry for entry in source.run.metrics if is_number(entry.get(key)) and is_number(entry.get(x))]
    return [float(entry[x]) for entry in lines], [float(entry[key]) for entry in lines]


def by_set(material: Material, key: str) -> Iterator[tuple[Measure, list[tuple[Arm, list[Points]]]]]:
    """For every prompt set: its first measure, and the arms' curves of a figure that all of its measures share."""
    firsts: dict[str, Measure] = {}
    for measure in material.measures:
        firsts.setdefault(measure.prompts, measure)
    for measure in firsts.values():
        yield measure, by_arm(material, lambda source, m=measure: column(source, m, key))


def by_arm(material: Material, points: Callable[[Source], Points]) -> list[tuple[Arm, list[Points]]]:
    """The curves of each arm's seeds, without empty ones."""
    found = [(arm, [points(source) for source in material.members(arm)]) for arm in material.arms]
    kept = [(arm, [curve for curve in curves if curve[0]]) for arm, curves in found]
    return [(arm, curves) for arm, curves in kept if curves and overlap(curves)]


def overlap(curves: Sequence[Points]) -> bool:
    """Whether there is an x that all curves reach."""
    return max(xs[0] for xs, _ in curves) <= min(xs[-1] for xs, _ in curves)


def chart(
    material: Material, points: Sequence[tuple[Arm, list[Points]]], key: str, title: str, x: str, **more: Any
) -> Chart | None:
    """A line for every arm; None where there is nothing to draw."""
    if not points:
        return None
    xs, rows = joined([over_seeds(arm, curves) for arm, curves in points])
    arms = material.arms
    lines = [
        line(arm.label, colour(arms, arm), values, dash(arms, arm))
        for (arm, _), values in zip(points, rows, strict=True)
    ]
    return Chart(key, title, x, xs, lines, **more)


def line(label: str, hue: str, rows: Sequence[Values], style: int) -> Line:
    """A line of mean, and low and high where there are several seeds."""
    low, high = (rows[1], rows[2]) if len(rows) > 1 else (None, None)
    return Line(label, rows[0], hue, style, low, high)
