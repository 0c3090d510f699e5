"""Comparing runs: synthetic run folders with straight curves, whose statistics are known without the code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffexp.config import Recipe
from diffexp.errors import UserError
from diffexp.runs.reading import Measure, Run
from diffexp.study import comparison as sides
from diffexp.study import comparison_report

GUIDANCE = "[exploration.guidance]\nlow = 1.0\nthreshold = 900\n"
WORDS = "[exploration.words]\nlow = 1.0\nhigh = 1.2\n"
OBJECTIVE = Measure("animals", "emoji-alignment")


def write_run(
    path: Path,
    slope: float = 1.0,
    *,
    seed: int = 0,
    algorithm: str = "ddpo",
    exploration: str = "",
    settings: str = "",
    evaluations: int = 11,
    every: int = 100,
    reward: str = "emoji-alignment",
) -> Path:
    """A run whose reward is 1 + slope · q/1000 at every 100 queries, its judge's 0.5 more, and that took 20 s."""
    path.mkdir(parents=True)
    (path / "config.toml").write_text(
        f'seed = {seed}\nprompts = "animals"\nreward = "{reward}"\ndevice = "cpu"\n{settings}\n'
        f'[algorithm]\nname = "{algorithm}"\n[exploration]\nuntil = 0.75\n{exploration}'
    )
    rows = [
        {"iteration": k, "queries": k * every, "prompts": prompts, "reward": name, "mean": mean, "std": 1.0, "n": 450}
        for k in range(evaluations)
        for mean in [1 + slope * k * every / 1000]
        for prompts, name, mean in [
            ("animals", reward, mean),
            ("animals", "emoji-judge", mean + 0.5),
            ("animals-unseen", reward, mean - 0.2),
        ]
    ]
    (path / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = [{"iteration": k + 1, "queries": 64 * (k + 1), "reward_mean": 1.0, "seconds": 2.0} for k in range(10)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    return path


def analyse(*paths: Path) -> sides.Comparison:
    return sides.analyse([Run.read(path) for path in paths])


def add_samples(run: Path, iteration: int, colours: list[str], prompts: bool = True) -> None:
    folder = run / "samples" / f"iteration-{iteration:04d}"
    folder.mkdir(parents=True)
    for k, colour in enumerate(colours):
        Image.new("RGB", (64, 64), colour).save(folder / f"{k}.png")
    Image.new("RGB", (9, 9)).save(folder.with_suffix(".png"))
    if prompts:
        (run / "samples" / "prompts.json").write_text(json.dumps(["cat", "dog"][: len(colours)]))


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two seeds of DDPO, and of a DiffExp that learns twice as fast; both end after 1,000 queries."""
    plain = [write_run(tmp_path / f"plain-{seed}", 1.0, seed=seed) for seed in (0, 1)]
    explored = [
        write_run(tmp_path / f"explored-{s}", 2.0, seed=s, exploration=GUIDANCE + WORDS, settings="trackers = []")
        for s in (0, 1)
    ]
    return [*plain, *explored]


def test_compare_end_to_end(runs: list[Path], tmp_path: Path):
    for run, colour in zip(runs, ("red", "red", "blue", "blue"), strict=True):
        add_samples(run, 0, ["white", "gray"])
        add_samples(run, 2, ["black", "black"])
        add_samples(run, 10, [colour, colour])
    out = tmp_path / "out"
    comparison = sides.compare(runs, out)
    assert {file.name for file in out.iterdir()} == {file.name for file in comparison.files}
    assert {file.name for file in comparison.files} == {
        *("comparison.json", "comparison.md", "curves.png", "curves.svg", "grid.png"),
    }
    plain, explored = comparison.results
    assert (plain.arm.label, explored.arm.label) == ("DDPO", "DDPO + DiffExp")
    assert explored.baseline is plain.baseline is plain.arm
    # The last tenth of 11 evaluations are those at 900 and 1,000 queries.
    assert plain.final[OBJECTIVE].value == pytest.approx(1.95)
    assert plain.iqm == pytest.approx(1.95)
    assert explored.final[OBJECTIVE].value == pytest.approx(2.9)
    assert explored.final[Measure("animals", "emoji-judge")].value == pytest.approx(3.4)
    assert explored.final[Measure("animals-unseen", "emoji-alignment")].value == pytest.approx(2.7)
    assert plain.seconds == pytest.approx(20)
    for fraction, level in zip((0.5, 0.8, 1.0), explored.levels, strict=True):
        assert level.reward == pytest.approx(1 + 0.95 * fraction)
        assert level.median.queries == pytest.approx(475 * fraction)
        assert level.share == 1
        assert level.ratio.least == level.ratio.most == pytest.approx(0.5)
        assert (level.ratio.low, level.ratio.high) == (pytest.approx(0.5), pytest.approx(0.5))
    assert [level.median.queries for level in plain.levels] == pytest.approx([475, 760, 950])
    assert [level.ratio for level in plain.levels] == [None, None, None]
    # Normalised to the baseline's gain of 0.95: the means of 0...1 and of 0...2 over the budget.
    assert plain.nauc.value == pytest.approx(0.5 / 0.95)
    assert explored.nauc.value == pytest.approx(1 / 0.95)

    with Image.open(out / "grid.png") as grid:
        columns = [grid.width - 70 - 133, grid.width - 70]
        rows = [grid.height - 70 - 133 * k for k in (2, 1, 0)]
        found = [[grid.getpixel((x, y)) for x in columns] for y in rows]
    assert found == [[(255, 255, 255), (128, 128, 128)], [(255, 0, 0)] * 2, [(0, 0, 255)] * 2]


def test_the_files_say_what_was_found(runs: list[Path], tmp_path: Path):
    comparison = sides.compare(runs, tmp_path / "out")
    numbers = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert numbers["objective"] == {"prompts": "animals", "reward": "emoji-alignment"}
    explored = numbers["arms"][1]
    assert explored["runs"] == [{"seed": 0, "run": "explored-0"}, {"seed": 1, "run": "explored-1"}]
    assert explored["levels"][2]["ratio"]["least"] == pytest.approx(0.5)
    assert explored["levels"][2]["by_seed"][1]["queries"] == pytest.approx(475)
    assert str(tmp_path) not in json.dumps(numbers)
    text = (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith("| DDPO + DiffExp"))
    assert [cell.strip() for cell in row.split("|")[1:-1]] == [
        *("DDPO + DiffExp", "2", "2.900 [2.900, 2.900]", "475 (2/2)"),
        *("0.50 [0.50, 0.50]", "3.400 [3.400, 3.400]", "20"),
    ]
    assert "| 950 (2/2) | 1.00 |" in text
    assert "held out: emoji-judge" in text
    assert "curves.png" in text
    assert "grid.png" not in text  # there are no samples
    assert not (tmp_path / "out" / "grid.png").exists()
    assert comparison.table().row_count == 2
    assert len(comparison.table().columns) == 7


def test_a_comparison_can_be_made_again(tmp_path: Path):
    runs = [write_run(tmp_path / "plain"), write_run(tmp_path / "explored", 2.0, exploration=WORDS)]
    sides.compare(runs, tmp_path / "out")
    first = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir() if file.suffix != ".png"}
    sides.compare(runs, tmp_path / "out")
    assert first == {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir() if file.suffix != ".png"}


def test_a_slower_method_is_censored(tmp_path: Path):
    plain = write_run(tmp_path / "plain", 2.0)
    slow = write_run(tmp_path / "slow", 1.0, exploration=WORDS)
    comparison = sides.compare([plain, slow], tmp_path / "out")
    result = comparison.results[1]
    # The baseline reaches 1 + 1.9 after 950 queries; the slow one is at 2 when it ends, after 1,000.
    level = result.levels[-1]
    assert (level.median, level.share) == ((1000, False), 0)
    assert (level.ratio.least, level.ratio.most) == (pytest.approx(1000 / 950), float("inf"))
    assert level.ratio.low is None
    text = (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")
    assert "≥ 1,000 (0/1) | ≥ 1.05 |" in text
    assert "one seed" in comparison.notes[0]
    numbers = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert numbers["arms"][1]["levels"][2]["ratio"]["most"] is None
    # Half of the gain it does reach: 1 + 0.95 after 950 queries, the baseline after 475.
    assert result.levels[0].ratio.least == pytest.approx(2.0)


def test_a_column_has_one_number_of_decimals():
    assert comparison_report.decimals([7.13, -6.9334, 0.02]) == 3
    assert comparison_report.decimals([0.0377, 0.0042], digits=3) == 4
    assert comparison_report.decimals([12345.6, None, float("inf")]) == 0
    assert comparison_report.decimals([0.0]) == 3
    assert [comparison_report.fixed(value, 3) for value in (7.13, 12345.0, -0.0001)] == ["7.130", "12,345.000", "0.000"]


def test_half_of_the_seeds_censored(tmp_path: Path):
    paths = [write_run(tmp_path / f"plain-{s}", 1.0, seed=s) for s in (0, 1)]
    paths += [write_run(tmp_path / f"x-{s}", slope, seed=s, exploration=WORDS) for s, slope in ((0, 2.0), (1, 0.5))]
    level = analyse(*paths).results[1].levels[-1]
    assert level.share == 0.5
    assert level.median == ((475 + 1000) / 2, False)
    assert level.ratio.least == pytest.approx((475 / 950 + 1000 / 950) / 2)
    assert level.ratio.most == float("inf")


def test_grids_and_budgets_may_differ(tmp_path: Path):
    plain = write_run(tmp_path / "plain", 1.0)
    other = write_run(tmp_path / "x", 1.0, exploration=WORDS, evaluations=41, every=50)
    comparison = analyse(plain, other)
    assert comparison.results[1].levels[-1].ratio.least == pytest.approx(1.0)
    assert comparison.results[1].nauc.value == pytest.approx(comparison.results[0].nauc.value)
    assert any("Budgets differ: DDPO 1,000 queries" in note for note in comparison.notes)


def test_a_baseline_that_gains_nothing_sets_no_level(tmp_path: Path):
    plain, other = write_run(tmp_path / "plain", -0.5), write_run(tmp_path / "x", 1.0, exploration=WORDS)
    comparison = analyse(plain, other)
    assert [result.levels for result in comparison.results] == [[], []]
    assert any("gained nothing" in note for note in comparison.notes)
    assert "| – | – |" in comparison_report.markdown(comparison, has_grid=False)


def test_one_evaluation_only(tmp_path: Path):
    comparison = sides.compare([write_run(tmp_path / "run", evaluations=1)], tmp_path / "out")
    assert comparison.results[0].final[OBJECTIVE] == (1.0, None, None)
    assert comparison.results[0].levels == []


def test_ratios_need_a_common_seed(tmp_path: Path):
    paths = [write_run(tmp_path / "plain", seed=0), write_run(tmp_path / "x", 2.0, seed=1, exploration=WORDS)]
    comparison = analyse(*paths)
    assert comparison.results[1].levels[-1].ratio is None
    assert any("share no seed" in note for note in comparison.notes)


def test_arms_their_labels_and_baselines(tmp_path: Path):
    recipes = {
        "a": {"exploration": GUIDANCE + WORDS},
        "b": {},
        "c": {"exploration": WORDS},
        "d": {"exploration": GUIDANCE},
        "e": {"algorithm": "alignprop", "exploration": WORDS + GUIDANCE},
        "f": {"exploration": GUIDANCE.replace("1.0", "0.0") + WORDS},
    }
    arms = sides.arms_of([Run.read(write_run(tmp_path / name, **settings)) for name, settings in recipes.items()])
    assert [arm.label for arm in arms] == [
        "DDPO + DiffExp (exploration.guidance.low=1.0)",
        "DDPO",
        "DDPO + word weighting",
        "DDPO + guidance schedule",
        "AlignProp + DiffExp",
        "DDPO + DiffExp (exploration.guidance.low=0.0)",
    ]
    baselines = [sides.baseline_of(arm, arms) for arm in arms]
    assert [baseline.first.name for baseline in baselines] == ["b", "b", "b", "b", "a", "b"]


def test_recipes_as_training_writes_them(tmp_path: Path):
    overrides = {
        "plain": ("emoji-ddpo", {}),
        "plain-1": ("emoji-ddpo", {"seed": 1, "rollout.batch": 3, "device": "cpu", "evaluation.every": 2}),
        "explored": ("emoji-ddpo-diffexp", {}),
        "alignprop": ("emoji-alignprop-diffexp", {}),
    }
    runs = []
    for name, (recipe, settings) in overrides.items():
        path = write_run(tmp_path / name)
        (path / "config.toml").write_text(Recipe.load(recipe, settings).to_toml())
        rows = (path / "evaluations.jsonl").read_text().replace('"animals"', '"animal-activities"')
        (path / "evaluations.jsonl").write_text(rows)
        runs.append(Run.read(path))
    assert {run.objective for run in runs} == {Measure("animal-activities", "emoji-alignment")}
    arms = sides.arms_of(runs)
    assert [arm.label for arm in arms] == ["DDPO", "DDPO + DiffExp", "AlignProp + DiffExp"]
    assert list(arms[0].runs) == [0, 1]


def test_exploration_until_zero_is_none(tmp_path: Path):
    run = write_run(tmp_path / "run", exploration=WORDS)
    assert Run.read(run).label == "DDPO + word weighting"
    (run / "config.toml").write_text((run / "config.toml").read_text().replace("until = 0.75", "until = 0.0"))
    assert Run.read(run).label == "DDPO"
    assert [list(arm.runs) for arm in sides.arms_of([Run.read(run), Run.read(write_run(tmp_path / "b", seed=1))])] == [
        [0, 1]
    ]


def test_what_does_not_change_training_does_not_part_arms(tmp_path: Path):
    a = write_run(tmp_path / "a", seed=0, settings="[rollout]\nbatch = 4\nimages_per_prompt = 2\n[update]\nbatch = 1")
    b = write_run(
        tmp_path / "b", seed=1, settings="[rollout]\nbatch = 8\nimages_per_prompt = 2\n[evaluation]\nevery = 5"
    )
    c = write_run(tmp_path / "c", seed=1, settings="[rollout]\nbatch = 8\nimages_per_prompt = 1")
    assert [list(arm.runs) for arm in sides.arms_of([Run.read(b), Run.read(a), Run.read(c)])] == [[0, 1], [1]]


def test_a_resumed_run_counts_each_iteration_once(tmp_path: Path):
    run = write_run(tmp_path / "run")
    before = Run.read(run)
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        lines = (run / name).read_text()
        (run / name).write_text(lines + lines)
    after = Run.read(run)
    assert after.seconds == before.seconds == 20
    assert list(after.evaluations[OBJECTIVE].values) == list(before.evaluations[OBJECTIVE].values)


def test_a_run_that_still_writes_can_be_read(tmp_path: Path):
    run = write_run(tmp_path / "run")
    with (run / "evaluations.jsonl").open("a") as file:
        file.write('{"iteration": 11, "quer')
    assert len(Run.read(run).evaluations[OBJECTIVE].queries) == 11
    (run / "metrics.jsonl").unlink()
    assert Run.read(run).seconds is None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "config.toml").unlink(), "it has no config.toml"),
        (lambda run: (run / "config.toml").write_text("seed = "), "config.toml is no valid TOML"),
        (lambda run: (run / "config.toml").write_text('prompts = "animals"'), "no seed"),
        (lambda run: (run / "evaluations.jsonl").unlink(), "no evaluations"),
        (lambda run: (run / "evaluations.jsonl").write_text("\n"), "no evaluations"),
        (lambda run: (run / "evaluations.jsonl").write_text("{}\n[\n{}\n"), "line 2: not a JSON object"),
        (lambda run: (run / "evaluations.jsonl").write_text('{"queries": 0}\n'), "entry 1: needs prompts"),
        (
            lambda run: (run / "evaluations.jsonl").write_text(
                '{"queries": 0, "prompts": "animals", "reward": "r", "mean": NaN}\n'
            ),
            "the mean reward is nan",
        ),
    ],
)
def test_a_folder_that_is_no_good_run(tmp_path: Path, damage, message: str):
    run = write_run(tmp_path / "run")
    damage(run)
    with pytest.raises(UserError) as caught:
        sides.compare([run], tmp_path / "out")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_mistakes_of_the_call(tmp_path: Path):
    run = write_run(tmp_path / "runs" / "a")
    other = write_run(tmp_path / "other", reward="emoji-aesthetic")
    for paths, out, message in [
        ([], "out", "no runs to compare"),
        ([tmp_path / "nowhere"], "out", "no such folder"),
        ([tmp_path / "runs"], "out", "it holds runs: give them, as runs/a"),
        ([run, run], "out", "the same recipe with the same seed 0"),
        ([run, other], "out", "train on different goals"),
        ([run], "runs/a", "is a run; give a folder of its own"),
        ([run], "runs/a/config.toml", "is a file"),
    ]:
        with pytest.raises(UserError, match=message):
            sides.compare(paths, tmp_path / out)


def write_sum(path: Path, reward: str = "emoji-aesthetic+0.5*emoji-alignment", **settings: Any) -> Path:
    """A run on a sum of two rewards, which are evaluated one by one, after the other way round; and so is the judge."""
    run = write_run(path, **settings)
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(config.replace('"emoji-alignment"', f'"{reward}"'))
    rows = (run / "evaluations.jsonl").read_text()
    (run / "evaluations.jsonl").write_text(rows + rows.replace('"emoji-alignment"', '"emoji-aesthetic"'))
    return run


def test_the_members_of_a_sum_are_not_held_out(tmp_path: Path):
    comparison = analyse(write_sum(tmp_path / "plain"), write_sum(tmp_path / "x", slope=2.0, exploration=WORDS))
    assert comparison.objective == Measure("animals", "emoji-aesthetic"), "the sum's first member"
    header = comparison_report.main_rows(comparison)[0]
    assert header[5:-1] == ["also trained on: emoji-alignment", "held out: emoji-judge"]
    panels = [(panel.title, panel.ylabel) for panel in comparison_report.panels(comparison)]
    assert sorted(panels) == [
        *(("animals", f"emoji-{name}") for name in ("aesthetic", "alignment", "judge (held out)")),
        *(("animals-unseen", f"emoji-{name}") for name in ("aesthetic", "alignment")),
    ]
    assert comparison.notes[0] == (
        "Training was for emoji-aesthetic+0.5*emoji-alignment on animals: final reward, queries, ratio, IQM and nAUC "
        "are of emoji-aesthetic on animals alone."
    )
    assert not [note for note in analyse(write_run(tmp_path / "one")).notes if "Training was for" in note]


def test_a_sum_is_another_goal_than_its_member(tmp_path: Path):
    both, one = write_sum(tmp_path / "both"), write_sum(tmp_path / "one", reward="emoji-aesthetic", exploration=WORDS)
    assert Run.read(both).objective == Run.read(one).objective
    with pytest.raises(UserError, match=r"train on different goals, animals / emoji-aesthetic\+0"):
        analyse(both, one)


def test_what_stands_for_a_goal_that_was_not_evaluated(tmp_path: Path):
    run = write_run(tmp_path / "run")
    config = (run / "config.toml").read_text()
    for prompts, reward, expected in [
        ("animals-unseen", "emoji-alignment", ("animals-unseen", "emoji-alignment")),
        ("others", "2*emoji-alignment", ("animals", "emoji-alignment")),
        ("animals-unseen", "emoji-judge", ("animals", "emoji-judge")),
        ("animals-unseen", "emoji-aesthetic", ("animals-unseen", "emoji-alignment")),
    ]:
        changed = config.replace('"animals"', f'"{prompts}"').replace('"emoji-alignment"', f'"{reward}"')
        (run / "config.toml").write_text(changed)
        assert Run.read(run).objective == expected


def test_samples_of_another_count_are_left_out(tmp_path: Path):
    paths = [write_run(tmp_path / "a"), write_run(tmp_path / "x", 2.0, exploration=WORDS)]
    add_samples(paths[0], 0, ["white", "gray"], prompts=False)
    add_samples(paths[0], 3, ["red", "red"], prompts=False)
    add_samples(paths[1], 0, ["white"])
    sides.compare(paths, tmp_path / "out")
    with Image.open(tmp_path / "out" / "grid.png") as grid:
        assert 2 * 133 < grid.height < 3 * 133
