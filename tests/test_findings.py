"""The study from made-up runs whose curves are straight lines: what must come out is known without the code."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from diffexp.errors import UserError
from diffexp.markdown import replace_section
from diffexp.runs import durable
from diffexp.study import archive, claims, tuning
from diffexp.study.archive import Folders
from diffexp.study.claims import Verdict
from diffexp.study.experiments import jobs
from diffexp.study.pace import Times
from diffexp.study.paper import FIGURES, Bars, Curves, Tuning, chosen
from diffexp.study.reproduce import Plan, reproduce
from diffexp.study.scales import SCALES
from diffexp.study.statistics import Estimate, Ratio
from diffexp.study.trainer import Trainer

EMOJI = SCALES["emoji"]


def write_run(folder: Path, job: Any, gain: float, diversity: float = 0.5, fall: float = 0.0) -> None:
    """A run whose every reward rises from 7 by ``gain`` over its queries, the judge's half as much.

    The last evaluation is lower by ``fall``.
    """
    recipe, run = job.recipe, folder / job.name
    run.mkdir(parents=True)
    (run / "config.toml").write_text(recipe.to_toml())
    metrics = [
        {"iteration": k, "queries": 64 * k, "reward_mean": 7.123456789, "bad": ["x"], "seconds": 9.0}
        for k in range(1, recipe.iterations + 1)
    ]
    evaluations = [
        {
            "iteration": k,
            "queries": 64 * k,
            "prompts": prompts,
            "reward": reward,
            "mean": 7
            + (gain / 2 if "judge" in reward else gain) * k / recipe.iterations
            - fall * (k == recipe.iterations),
            "std": 1.0,
            "n": 9,
            "diversity": diversity,
        }
        for k in range(0, recipe.iterations + 1, recipe.evaluation.every)
        for prompts in recipe.evaluation.prompts
        for reward in recipe.evaluation.rewards
    ]
    for name, records in (("metrics.jsonl", metrics), ("evaluations.jsonl", evaluations)):
        (run / name).write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Figures 10a and 17a: DiffExp learns 1.25 times as fast, from images that are more diverse by 0.02."""
    folder = tmp_path_factory.mktemp("runs")
    for job in jobs(["10a"], EMOJI):
        explores = "diffexp" in job.name
        write_run(folder, job, 1.25 if explores else 1.0, 0.52 if explores else 0.5)
    store = tmp_path_factory.mktemp("docs") / "study"
    assert archive.pack(sorted(folder.iterdir()), store / archive.FILE) == 6
    return store


def redraw(
    store: Path, other: Path | None = None, figure: str = "all", scale: str = "emoji", dry_run: bool = False
) -> str:
    reproduce(figure, scale, None, store / "none", 1, dry_run, {}, Console(quiet=True), source=store, store=other)
    return store.with_name(f"{store.name}.md").read_text(encoding="utf-8")


def test_the_document_says_what_the_runs_say(store: Path) -> None:
    document = store.with_name("study.md")
    document.write_text("# Study\n\nBy hand.\n\n<!-- study -->\nold\n<!-- /study -->\n\nAlso by hand.\n")
    text = redraw(store)
    assert text.startswith("# Study\n\nBy hand.\n\n<!-- study -->\n")
    assert text.endswith("<!-- /study -->\n\nAlso by hand.\n")
    assert "\nold\n" not in text
    assert "A bootstrap of 3 seeds is too narrow: its 95 % interval holds the true mean in about 75 %" in text
    assert "Frozen weights" not in text, "all were in one precision"
    lines = text.splitlines()
    verdicts = {line.split(" | ")[0].strip("| "): line for line in lines if line.startswith("| 1")}
    for name in ("10a", "17a"):
        # two members of the ensemble, each with fewer queries and a higher reward
        assert "**reproduced** (4 of 4 tests passed)" in verdicts[name]
    assert "**not run yet**" in verdicts["1"]
    assert "### Settings tried" in text
    assert "Not run yet." in text
    for name in ("10a", "17a"):
        assert f"![Figure {name}](study/figure-{name}.png)" in text
        assert (store / f"figure-{name}.png").stat().st_size > 1000
    row = next(line for line in lines if line.startswith("| AlignProp + DiffExp | 3 |"))
    # the level 7 + f is reached after f / 1.25 of the queries; final rewards 8.25; diversity 0.52 over 0.5
    assert row.count("0.80 [0.80, 0.80]") == 3
    assert "8.250 [8.250, 8.250] | 8.250" in row
    assert "+0.02 [+0.02, +0.02]" in row
    assert not list(store.glob("*.md")), "a page of its own would be missing in the navigation"
    assert redraw(store) == text, "the same again"
    assert redraw(store, figure="9b") == text, "one figure drawn leaves the others in"
    with pytest.raises(UserError, match="--dry-run: with --from nothing is trained"):
        redraw(store, dry_run=True)
    with pytest.raises(UserError, match=r"the store has a run .* the --scale and --set that it was made with"):
        redraw(store, scale="sd15")


def test_a_store_outlives_a_kill_while_it_is_written(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = store / archive.FILE
    before = file.read_bytes()

    def killed(path: Path, data: bytes) -> None:
        path.write_bytes(data[: len(data) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(durable, "write_synced", killed)
    with pytest.raises(KeyboardInterrupt):
        archive.pack([], file)
    assert file.read_bytes() == before


def test_a_study_cut_short_says_so(tmp_path: Path) -> None:
    folder, store = tmp_path / "runs", tmp_path / "study"
    for job in jobs(["10a"], EMOJI, seeds=2) + [job for job in jobs(["10b"], EMOJI) if "diffexp" not in job.name]:
        write_run(folder, job, 1.0)
    slim = folder / "drawbench-alignprop-s1" / "config.toml"
    slim.write_text(slim.read_text().replace('precision = "bf16"', 'precision = "fp32"'))
    archive.pack(sorted(folder.iterdir()), store / archive.FILE)
    text = redraw(store)
    assert "\nFrozen weights were in bf16 in 6 runs, fp32 in 1: 1 of `drawbench-alignprop`.\n" in text
    assert f"**So far 7 of the {len(jobs(chosen('all', 'emoji'), EMOJI))} runs are finished.**" in text
    assert re.search(r"\| 10a \|.*, so far\) \|", text)
    assert "### Figure 10b" not in text, "a baseline alone is compared to nothing"


def test_arms_in_different_precisions_are_not_told_apart(tmp_path: Path) -> None:
    """A seed whose runs differ in more than the method says nothing of the method, however far they are apart."""
    runs, store = tmp_path / "runs", tmp_path / "study"
    gains = {"diffexp": 2.0, "threshold-800": 1.5, "threshold-700": 1.0}
    for job in jobs(["9b"], EMOJI):
        write_run(runs, job, next((gain for name, gain in gains.items() if name in job.name), 1.0))
    one = runs / "pickscore-alignprop-diffexp-s1" / "config.toml"
    one.write_text(one.read_text().replace('precision = "bf16"', 'precision = "fp32"'))
    archive.pack(sorted(runs.iterdir()), store / archive.FILE)
    text = redraw(store)
    tests = [line for line in text.splitlines() if "over DiffExp, t_thres" in line]
    assert "| +0.5 [+0.5, +0.5]; fp32 against bf16 | 3 | not determined |" in tests[0]
    assert "| +0.5 [+0.5, +0.5] | 3 | reproduced |" in tests[1]
    assert "| **reproduced** (1 of 1 test passed, 1 not determined) |" in text


def test_figure_10b_compares_the_highest_reward(tmp_path: Path) -> None:
    """The claim is of "a significantly higher maximum reward value": who ends lower may have been higher before."""
    runs, store = tmp_path / "runs", tmp_path / "study"
    for job in jobs(["10b"], EMOJI):
        explores = "diffexp" in job.name
        write_run(runs, job, 2.4 if explores else 1.0, fall=1.8 if explores else 0.0)
    archive.pack(sorted(runs.iterdir()), store / archive.FILE)
    # 7, 7.6, 8.2, 8.8, 7.6 with DiffExp, smoothed over three evaluations 7, 7.6, 8.2, 8.2, 7.6; 7 to 8 without
    lines = [line for line in redraw(store, figure="10b").splitlines() if "over AlignProp: higher" in line]
    assert [line.split(": ")[1].split(" | ")[0] for line in lines] == ["higher maximum"]
    assert "| +0.2 [+0.2, +0.2] | 3 | reproduced |" in lines[0]


def test_a_store_is_small_and_gives_the_runs_back(store: Path, tmp_path: Path) -> None:
    file = store / archive.FILE
    assert file.stat().st_size / 6 < 12_000
    runs = archive.unpack(file, tmp_path)
    assert [run.name for run in runs] == sorted(run.name for run in runs)
    assert all(archive.complete(run) for run in runs)
    metrics = [json.loads(line) for line in (runs[0] / "metrics.jsonl").read_text().splitlines()]
    assert metrics[0] == {"iteration": 1, "queries": 64, "reward_mean": 7.12346, "seconds": 9.0}
    before = file.read_bytes()
    assert archive.pack(runs, file) == 6
    assert file.read_bytes() == before
    (tmp_path / "bad.jsonl").write_text('{"run": "a"}\n')
    with pytest.raises(UserError, match="line 1: no run"):
        archive.unpack(tmp_path / "bad.jsonl", tmp_path)
    with pytest.raises(UserError, match="is a store already: leave --store out"):
        redraw(store, tmp_path)
    with pytest.raises(UserError, match=r"has no runs\.jsonl, so it is no store: also give --store"):
        redraw(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        redraw(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_study_goes_on_from_its_store_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On another machine: what the store has is not trained again, and what it tuned is taken."""
    elsewhere, out, store = tmp_path / "elsewhere", tmp_path / "here", tmp_path / "study"
    for job in jobs(["tuning"], EMOJI):
        write_run(elsewhere, job, 2.0 if "1e-2" in job.name else 1.0)
    tuned = tuning.choice(EMOJI, Folders(elsewhere))
    assert tuned["alignprop", "drawbench"]["optimizer.learning_rate"] == 1e-2
    runs = {job.name: job for job in jobs(["10a"], EMOJI, chosen=tuned)}
    missing = runs.pop("drawbench-alignprop-diffexp-s1")
    for job in runs.values():
        write_run(elsewhere, job, 1.0)
    archive.pack(sorted(elsewhere.iterdir()), store / archive.FILE)

    trained = []

    def run(trainer: Trainer) -> None:
        for state in trainer.waiting:
            trained.append(state.job)
            write_run(out / "emoji", state.job, 1.5)
            (state.folder / "lora").mkdir()
            (state.folder / "lora" / "README.md").touch()  # where the card is, a run is finished

    monkeypatch.setattr(Trainer, "run", run)
    monkeypatch.setattr(Times, "try_out", lambda *_: None)

    def go_on(figure: str, dry_run: bool = False, **settings: Any) -> str:
        console = Console(record=True, width=200)
        with console.capture() as said:
            reproduce(figure, "emoji", None, out, 1, dry_run, settings, console, store=store)
        return said.get()

    assert "6 runs, 5 finished" in go_on("10a", dry_run=True)
    assert "6 runs, 5 finished" in go_on("10a", dry_run=True, **{"model.precision": "fp32"}), "a machine's affair"
    assert not out.exists()
    with pytest.raises(UserError, match=r"the store has a run .* of another recipe: choose another --store"):
        go_on("10a", samples=2)
    go_on("10a")
    assert trained == [missing], "with the settings that tuning chose elsewhere"
    assert len(archive.unpack(store / archive.FILE, tmp_path / "all")) == len(list(elsewhere.iterdir())) + 1
    assert (out / "emoji" / "figures" / "figure-10a.png").is_file(), "of all runs, wherever they were trained"
    plan = Plan({"8": FIGURES["8"]}, EMOJI, None, {}, Folders(out / "emoji", tmp_path / "all"))
    assert [state.finished for state in plan.states()] == [False, False], "a store has no model to paint with"


def test_tuning_takes_the_best_mean_of_both_sides(tmp_path: Path) -> None:
    """The mean over sides and seeds decides, task by task, once every candidate has been tried there to its end."""
    gains = {"lr-1e-3-s100": 1.0, "lr-1e-3-s101": 1.0, "lr-3e-3-s100": 2.5, "lr-3e-3-s101": 0.0}
    every = jobs(["tuning"], EMOJI)
    winners = "dolphin-ddpo-diffexp-lr-3e-3-epochs-2", "aesthetic-alignprop-lr-1e-2", "pickscore-ddpo-lr-1e-3"
    for job in every[:-1]:
        best = any(winner in job.name for winner in winners)
        write_run(tmp_path, job, 3.0 if best else next((g for key, g in gains.items() if job.name.endswith(key)), 0.5))
    tuned = {("alignprop", task) for task in ("pickscore", "drawbench", "aesthetic", "sdxl")}
    tuned |= {("ddpo", task) for task in ("dolphin", "pickscore", "aesthetic")}
    assert tuning.choice(EMOJI, Folders(tmp_path)).keys() == tuned - {("ddpo", "aesthetic")}, "a run of it is missing"
    write_run(tmp_path, every[-1], 0.0)
    choice = tuning.choice(EMOJI, Folders(tmp_path))
    assert choice.keys() == tuned
    epochs = {"optimizer.learning_rate": 3e-3, "algorithm.inner_epochs": 2}
    assert choice["ddpo", "dolphin"] == epochs, "3 and 0.5 against 1.25 and 1.25"
    assert choice["ddpo", "pickscore"] == {"optimizer.learning_rate": 1e-3}, "a candidate of this task alone"
    for elsewhere in (("ddpo", "aesthetic"), ("alignprop", "drawbench")):
        assert choice[elsewhere] == {"optimizer.learning_rate": 3e-3}
    assert choice["alignprop", "sdxl"] == {"optimizer.learning_rate": 1e-2}, "3 and 0.5 against 1.25 and 1.25"
    figure = FIGURES["tuning"]
    assert isinstance(figure, Tuning)
    rows = tuning.rows(tuning.tried(figure, EMOJI, Folders(tmp_path)))
    assert ["dolphin", "DDPO", "lr-3e-3", "9.5, 7", "8.25", ""] in rows
    assert len(rows) == 1 + 36
    assert sum(row[-1] == "yes" for row in rows) == 10


def test_every_figure_of_numbers_in_the_paper_has_a_claim() -> None:
    numbers = {name for name, figure in chosen("all", "emoji").items() if isinstance(figure, Curves | Bars)}
    assert set(claims.CLAIMS) == numbers - {"controls"}, "the controls are ours"


def test_each_variant_of_figure_9a_is_tested_in_both_that_it_claims() -> None:
    """All of them are better "in terms of rewards and sample efficiency" than the baseline."""
    over = {(test.kind, test.better) for test in claims.CLAIMS["9a"].tests if test.worse == "plain"}
    variants = ("diffexp", "guidance", "words")
    assert over == {(kind, name) for kind in ("fewer queries", "higher reward") for name in variants}


def ratio(least: float, most: float, low: float | None, high: float | None) -> Ratio:
    return Ratio(least, most, low, high, 3, "median")


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (ratio(0.8, 0.8, 0.7, 0.9), Verdict.REPRODUCED),
        (ratio(0.8, 0.8, 0.7, 1.1), Verdict.OPEN),
        (ratio(1.2, 1.2, 0.9, 1.4), Verdict.OPEN),
        (ratio(1.2, 1.2, 1.1, 1.4), Verdict.NOT),
        (ratio(0.8, 0.8, None, None), Verdict.UNKNOWN),  # one seed
        (ratio(0.5, float("inf"), 0.4, float("inf")), Verdict.OPEN),  # censored: may be either
        (ratio(1.2, float("inf"), 1.1, float("inf")), Verdict.NOT),
        (ratio(0.0, 0.7, 0.0, 0.8), Verdict.REPRODUCED),  # the baselines were censored
        (ratio(0.0, float("inf"), 0.0, float("inf")), Verdict.UNKNOWN),
        (None, Verdict.UNKNOWN),
    ],
)
def test_verdicts_on_ratios(found: Ratio | None, verdict: Verdict) -> None:
    assert claims.of_ratio(found) is verdict


def test_verdicts_on_differences_and_claims() -> None:
    estimates = [(0.2, 0.1, 0.3), (0.2, -0.1, 0.3), (-0.2, None, None), (-0.1, -0.3, 0.1), (-0.2, -0.3, -0.1)]
    found = [claims.of_difference(Estimate(*estimate)) for estimate in estimates]
    assert found == [Verdict.REPRODUCED, Verdict.OPEN, Verdict.UNKNOWN, Verdict.OPEN, Verdict.NOT]
    assert claims.together([]) is Verdict.MISSING
    assert claims.together([Verdict.UNKNOWN]) is Verdict.UNKNOWN
    assert claims.together([Verdict.REPRODUCED, Verdict.UNKNOWN]) is Verdict.REPRODUCED
    assert claims.together([Verdict.REPRODUCED, Verdict.NOT]) is Verdict.PARTLY
    assert claims.together([Verdict.REPRODUCED, Verdict.OPEN]) is Verdict.PARTLY
    assert claims.together([Verdict.NOT, Verdict.NOT]) is Verdict.NOT
    assert claims.together([Verdict.NOT, Verdict.OPEN]) is Verdict.NOT
    assert claims.together([Verdict.OPEN, Verdict.UNKNOWN]) is Verdict.OPEN


def test_a_section_is_added_where_it_is_missing(tmp_path: Path) -> None:
    document = tmp_path / "a.md"
    for _ in range(2):
        replace_section(document, "one", "text")
        replace_section(document, "two", "more")
    assert document.read_text() == "<!-- one -->\ntext\n<!-- /one -->\n\n<!-- two -->\nmore\n<!-- /two -->\n"
