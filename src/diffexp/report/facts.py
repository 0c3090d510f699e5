"""What a report says in words and tables: the outcome, its certainty, the recipe and the environment."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from diffexp.durations import counted, duration
from diffexp.report.charts import fixed, number, signed
from diffexp.report.curves import gain_points, tags_of
from diffexp.report.sources import Material, Source
from diffexp.runs.reading import Measure, is_number
from diffexp.sharing.lora_header import without_paths
from diffexp.study.comparison import Arm, Comparison, analyse
from diffexp.study.comparison_report import decimals, level_rows, main_rows
from diffexp.study.statistics import Estimate, bootstrap_mean, final_reward
from diffexp.toml import toml_lines

CLEAR = 2.0
"""How many standard errors a change must have to be called one."""


@dataclass(frozen=True)
class Figure:
    """A number of the summary, with what it is of and what it was before."""

    name: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Verdict:
    """Whether the held-out rewards rose with the one that was trained on. ``kind``: "good", "bad" or "open"."""

    label: str
    kind: str
    text: str


@dataclass(frozen=True)
class Recipe:
    """A recipe in TOML, under the name of its arm."""

    label: str
    toml: str
    seeds: Sequence[int]


def title(material: Material) -> str:
    """What was trained on what."""
    labels = list(dict.fromkeys(arm.label for arm in material.arms))
    what = " and ".join(labels) if len(labels) <= 2 else f"{len(labels)} arms"
    goals = {without_paths(source.run.goal.reward) for source in material.sources}
    return f"{what} on {goals.pop() if len(goals) == 1 else 'several rewards'}"


def lede(material: Material) -> str:
    """The setting in a sentence."""
    first = material.first
    model = without_paths(str(first.setting("model", "path")))
    model = {"emoji": "the emoji world's Stable Diffusion", "emoji-xl": "its twin in XL's shape"}.get(model, model)
    prompts = without_paths(first.run.goal.prompts)
    seeds = {len(arm.runs) for arm in material.arms}
    runs = f"{counted(len(material.arms), 'arm')}, " if len(material.arms) > 1 else ""
    runs += " or ".join(str(k) for k in sorted(seeds)) + (" seed" if seeds == {1} else " seeds")
    each = " each" if len(material.arms) > 1 else ""
    what = "The denoising network of" if first.setting("model", "train") == "unet" else "A LoRA on"
    return f"{what} {model}, prompts {prompts}. {runs}{each}, {queries_text(material)}."


def queries_text(material: Material) -> str:
    """How far the runs are."""
    asked = sorted({source.queries for source in material.sources})
    span = f"{asked[0]:,}" if len(asked) == 1 else f"{asked[0]:,} to {asked[-1]:,}"
    return f"{span} reward queries{' a run' if len(material.sources) > 1 else ''}"


def progress(material: Material) -> str:
    """Where training stands, if it has not done all iterations."""
    short = [source for source in material.sources if source.done < source.iterations]
    parts = [f"{source.run.name}: iteration {source.done} of {source.iterations}" for source in short]
    if not parts:
        return ""
    kind = "Stopped early" if material.finished else "Not finished"
    return f"{kind}. " + "; ".join(parts[:4]) + ("; …" if len(parts) > 4 else "") + "."


def figures(material: Material) -> list[Figure]:
    """The summary of a single arm."""
    arm = material.arms[0]
    found = []
    for measure in material.measures:
        if measure.prompts == material.objective.prompts:
            change = outcome(material, arm, measure)
            kind = "held out" if material.first.run.held_out(measure) else "trained on"
            found.append(Figure(f"{without_paths(measure.reward)}, {kind}", change["after"], change["detail"]))
    found += [Figure("reward queries", f"{max(source.queries for source in material.members(arm)):,}")]
    return found + costs(material, arm)


def costs(material: Material, arm: Arm) -> list[Figure]:
    """Time, speed and memory of an arm."""
    members, found = material.members(arm), []
    seconds = [source.run.seconds for source in members if source.run.seconds]
    if seconds:
        images = [source.done * int(source.run.config.get("samples", 0)) for source in members if source.run.seconds]
        found.append(Figure("training time" + " a run" * (len(seconds) > 1), duration(sum(seconds) / len(seconds))))
        found.append(Figure("speed", f"{number(sum(images) / sum(seconds), 3)} images/s"))
    memory = [m["memory_gib"] for source in members for m in source.run.metrics if is_number(m.get("memory_gib"))]
    if memory:
        found.append(Figure("peak memory", f"{number(max(memory), 2)} GiB"))
    return found


def outcome(material: Material, arm: Arm, measure: Measure) -> dict[str, str]:
    """Before and after of an arm on one measure: the mean over seeds, its interval, and the change."""
    found = [source.run.scores[measure] for source in material.members(arm) if source.run.scores.get(measure)]
    if not found:
        return dict.fromkeys(("before", "after", "change", "detail"), "–")
    before = sum(lines[0]["mean"] for lines in found) / len(found)
    finals = [final_reward([line["mean"] for line in lines]) for lines in found]
    after = bootstrap_mean(finals)
    places = decimals(line["mean"] for source in material.sources for line in source.run.scores.get(measure, ()))
    interval = interval_text(after, places)
    change = signed(after.value - before, places) if any(len(lines) > 1 for lines in found) else "–"
    detail = f"{change} from {fixed(before, places)}" if change != "–" else "only evaluated once"
    return {
        "before": fixed(before, places),
        "after": fixed(after.value, places),
        "change": change,
        "detail": f"{detail}{', 95 % ' + interval if interval else ''}",
    }


def outcome_table(material: Material) -> tuple[list[str], list[list[str]]]:
    """Header and rows: everything evaluated, before and after, by arm."""
    several = len(material.arms) > 1
    ends = [arm.label for arm in material.arms] if several else ["after", "change"]
    rows = []
    for measure in material.measures:
        found = [outcome(material, arm, measure) for arm in material.arms]
        pairs = [(one["after"], one["change"]) if one["change"] != "–" else ("–", "–") for one in found]
        joint = [f"{after} ({change})" if change != "–" else "–" for after, change in pairs]
        cells = joint if several else pairs[0]
        names = [str(without_paths(measure.prompts)), str(without_paths(measure.reward))]
        rows.append([*names, ", ".join(tags_of(material.first, measure)), found[0]["before"], *cells])
    return ["prompts", "reward", "", "before", *ends], rows


def verdicts(material: Material) -> list[Verdict]:
    """For every arm and held-out reward on the training prompts: whether it followed the reward that was trained on."""
    goal = material.objective
    held_out = [m for m in material.measures if m.prompts == goal.prompts and material.first.run.held_out(m)]
    found = []
    for arm in material.arms:
        for measure in held_out:
            trained, held = gains(material, arm, goal), gains(material, arm, measure)
            if trained and held:
                error = standard_error(material, arm, measure)
                found.append(verdict(arm.label, goal.reward, str(without_paths(measure.reward)), trained, held, error))
    return found


def gains(material: Material, arm: Arm, measure: Measure) -> list[float]:
    """The mean gain over seeds after each evaluation but the first, in standard deviations at the start."""
    curves = [values for _, values in gain_points(material, arm, measure) if len(values) > 1]
    length = min(map(len, curves), default=0)
    return [sum(values[k] for values in curves) / len(curves) for k in range(1, length)]


def standard_error(material: Material, arm: Arm, measure: Measure) -> float:
    """Of the difference of two evaluations, in standard deviations, as if they shared no noise: an upper bound."""
    counts = [lines[0].get("n", 1) for s in material.members(arm) if (lines := s.run.scores.get(measure))]
    return math.sqrt(2 / max(1, sum(counts)))


def verdict(
    label: str, trained_name: str, held_name: str, trained: Sequence[float], held: Sequence[float], error: float
) -> Verdict:
    """In words whether ``held`` followed ``trained``; both are gains, and ``error`` is that of a difference."""
    clear, peak = CLEAR * error, max(held)
    numbers = f"{trained_name} {signed(trained[-1])} sd, {held_name} {signed(held[-1])} sd"
    if trained[-1] < clear:
        return Verdict(label, "open", f"{numbers}: the reward has not clearly risen, so there is nothing to hack yet.")
    if held[-1] < -clear:
        return Verdict(label, "bad", f"{numbers}: the held-out reward fell below its start. A sign of reward hacking.")
    if peak - held[-1] > clear:
        text = f"the held-out reward has fallen from its peak of {signed(peak)} sd. A sign of reward hacking."
        return Verdict(label, "bad", f"{numbers}: {text}")
    if held[-1] < clear:
        text = "the held-out reward did not clearly follow. Look at the images."
        return Verdict(label, "open", f"{numbers}: {text}")
    return Verdict(label, "good", f"{numbers}: the held-out reward rose with it. No sign of reward hacking.")


def comparison(material: Material) -> Comparison | None:
    """The statistics over arms; None for a single arm, and where the runs can't be compared."""
    goals = {source.run.goal for source in material.sources}
    evaluated = all(material.objective in source.run.evaluations for source in material.sources)
    if len(material.arms) < 2 or len(goals) > 1 or not evaluated:
        return None
    return analyse([source.run for source in material.sources])


def comparison_tables(found: Comparison) -> list[tuple[str, list[list[str]]]]:
    """The tables of a comparison under their captions; the first row of each is its header."""
    tables = [("Outcome by arm", main_rows(found))]
    if any(result.levels for result in found.results):
        tables.append(("Queries to a part of the baseline's gain", level_rows(found)))
    return [(caption, [[str(without_paths(text)) for text in row] for row in rows]) for caption, rows in tables]


def recipes(material: Material) -> list[Recipe]:
    """The recipe of every arm, without this machine's paths."""
    found = []
    for arm in material.arms:
        config = without_paths(dict(arm.first.config))
        found.append(Recipe(arm.label, "\n".join(toml_lines(config)).strip() + "\n", list(arm.runs)))
    return found


def environment(material: Material) -> list[tuple[str, str]]:
    """What the runs were made with; where they differ, all of it."""
    keys = dict.fromkeys(key for source in material.sources for key in source.environment)
    return [(key, values(material.sources, key)) for key in keys]


def values(sources: Sequence[Source], key: str) -> str:
    """The different values of an entry of the environment."""
    return ", ".join(dict.fromkeys(str(source.environment[key]) for source in sources if key in source.environment))


def exploration_text(material: Material, arm: Arm) -> str:
    """What explored, and for how long, in a sentence; nothing for an arm that does not."""
    source, parts = material.of(arm.first), []
    if "guidance" in arm.first.strategies:
        low, high = source.setting("exploration", "guidance", "low"), source.setting("sampler", "guidance")
        parts.append(f"guidance {low:g} in the early steps, then {high:g} (Eq. 7)")
    if "words" in arm.first.strategies:
        low, high, unit = (source.setting("exploration", "words", key) for key in ("low", "high", "unit"))
        parts.append(f"one random {unit or 'word'} of each prompt weighted by U({low:g}, {high:g}) (Eq. 8)")
    parts += [f"{part}, a strategy of its own" for part in arm.first.strategies if part not in ("guidance", "words")]
    return f"{'; '.join(parts)}. Iterations 1 to {source.last_exploring} of {source.iterations}." if parts else ""


def interval_text(estimate: Estimate, places: int) -> str:
    """A 95 % interval; nothing for one seed."""
    if estimate.low is None or estimate.high is None:
        return ""
    return f"[{fixed(estimate.low, places)}, {fixed(estimate.high, places)}]"
