from __future__ import annotations

import base64
import hashlib
import http.client
import io
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from reportruns import UNSEEN, make_run, write_lines
from test_training import recipe
from typer.testing import CliRunner

from diffexp import train
from diffexp.cli import app
from diffexp.errors import UserError
from diffexp.report import Material, charts, curves, facts, film, render, words, write
from diffexp.report.page import embedded
from diffexp.report.watch import Server, serve
from diffexp.runs.reading import Measure

SEEN, GOAL, JUDGE = "animal-activities", "emoji-alignment", "emoji-judge"


class Document(HTMLParser):
    """The elements of a page, and the text of its scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inline: list[tuple[str, dict[str, str | None], str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.inline.append((tag, dict(attrs), ""))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] in ("script", "style") and self.inline[-1][2] == "":
            self.inline[-1] = (*self.inline[-1][:2], data)

    def rules(self) -> dict[str, str]:
        """The content security policy."""
        policy = next(a["content"] for _, a in self.tags if a.get("http-equiv") == "Content-Security-Policy")
        return dict(rule.split(" ", 1) for rule in str(policy).split("; "))

    def data(self) -> dict[str, Any]:
        return json.loads(next(text for _, attributes, text in self.inline if attributes.get("id") == "data"))


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two arms of two seeds."""
    arms = [(False, 0.1), (True, 0.2)]
    return [
        make_run(tmp_path / f"{'explored' if x else 'plain'}-{seed}", seed, x, slope=slope)
        for x, slope in arms
        for seed in (0, 1)
    ]


def test_reward_curves_are_means_over_seeds_with_their_spread(runs: list[Path]) -> None:
    material = Material.read(runs)
    chart = curves.reward_charts(material)[0]
    assert (chart.title, chart.note, chart.tags) == (GOAL, f"on {SEEN}", ["seen prompts"])
    assert chart.xs == [0, 128, 256, 384, 512]
    values = []
    for run in runs[:2]:
        lines = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
        values.append([line["mean"] for line in lines if (line["prompts"], line["reward"]) == (SEEN, GOAL)])
    first, second = np.array(values)
    plain = chart.lines[0]
    assert plain.label == "DDPO"
    assert plain.values == pytest.approx((first + second) / 2)
    deviation = abs(first - second) / 2**0.5  # of two values
    assert plain.low == pytest.approx((first + second) / 2 - deviation)
    assert plain.high == pytest.approx((first + second) / 2 + deviation)
    assert [line.colour for line in chart.lines] == ["plain-1", "explore-1"]
    assert [one.tags for one in curves.reward_charts(material)] == [
        ["seen prompts"],
        ["seen prompts", "held-out reward"],
        ["unseen prompts"],
        ["unseen prompts", "held-out reward"],
    ]


def test_gains_are_in_standard_deviations_at_the_start(runs: list[Path]) -> None:
    material = Material.read(runs[:1])
    chart = curves.gain_charts(material)[0]
    curve = material.first.run.evaluations[Measure(SEEN, GOAL)].values
    assert chart.lines[0].values == pytest.approx((curve - curve[0]) / 1.5)
    assert [line.colour for line in chart.lines] == ["trained", "held-1", "trained", "held-1"]
    assert [line.dash for line in chart.lines] == [0, 0, 1, 1]
    both = curves.gain_charts(Material.read(runs))
    assert both[0].limits == both[1].limits
    assert both[0].limits[1] == max(value for line in both[1].lines for value in line.high)


@pytest.mark.parametrize(
    ("trained", "held", "kind", "text"),
    [
        ([0.2, 0.4], [0.1, 0.3], "good", "rose with it"),
        ([0.2, 0.4], [0.1, -0.3], "bad", "fell below its start"),
        ([0.2, 0.4], [0.4, 0.15], "bad", "fallen from its peak"),
        ([0.2, 0.4], [0.0, 0.05], "open", "did not clearly follow"),
        ([0.0, 0.05], [0.3, 0.3], "open", "not clearly risen"),
    ],
)
def test_the_verdict_on_the_held_out_reward(trained: list[float], held: list[float], kind: str, text: str) -> None:
    found = facts.verdict("DDPO", "r", "h", trained, held, error=0.05)
    assert found.kind == kind
    assert text in found.text


def test_a_chart_has_one_number_of_decimals() -> None:
    lines = [charts.Line("a", [0.0, 0.3519], "plain-1"), charts.Line("b", [-0.0001, 0.0546], "plain-2")]
    chart = charts.Chart("gain", "gain", "queries", [0, 64], lines, digits=3)
    assert chart.rows() == [["0", "0.000", "0.000"], ["64", "0.352", "0.055"]]
    beside = charts.Chart("gain", "gain", "queries", [0, 64], lines, digits=3, limits=(0, 2.5))
    assert beside.rows()[1] == ["64", "0.35", "0.05"]


def test_a_hacked_reward_is_called_so(tmp_path: Path) -> None:
    material = Material.read([make_run(tmp_path / "run", hacked=True)])
    assert [found.kind for found in facts.verdicts(material)] == ["bad"]
    assert facts.verdicts(Material.read([make_run(tmp_path / "alone", held_out=None)])) == []


def test_diversity_and_drift_are_drawn_for_every_prompt_set(runs: list[Path]) -> None:
    material = Material.read(runs)
    diversity, drift = curves.diversity_charts(material), curves.drift_charts(material)
    assert [chart.title for chart in diversity] == [SEEN, f"{SEEN}-unseen"]
    assert diversity[0].lines[0].values == pytest.approx([0.5, 0.48, 0.46, 0.44, 0.42])
    assert [chart.note for chart in drift] == [f"on {SEEN}", f"on {SEEN}-unseen"]
    assert drift[1].lines[1].values == pytest.approx([0, 0.002, 0.004, 0.006, 0.008])


@pytest.mark.parametrize("until", [0.29, 0.57, 0.58])  # times 100, floats are just below the whole number
def test_the_end_of_exploration_is_that_of_training(tmp_path: Path, until: float) -> None:
    explores = {"guidance": {"fraction": 0.1}, "until": until}
    material = Material.read([make_run(tmp_path / "run", iterations=100, every=50, exploration=explores)])
    last = round(100 * until)
    assert curves.exploration_end(material) == (64 * last, "exploration ends")
    assert facts.exploration_text(material, material.arms[0]).endswith(f" Iterations 1 to {last} of 100.")


def test_what_was_trained_is_called_by_its_name(tmp_path: Path) -> None:
    lora, network = (make_run(tmp_path / kind, model={"train": kind}) for kind in ("lora", "unet"))
    model = "the emoji world's Stable Diffusion, prompts animal-activities. 1 seed, 512 reward queries."
    assert facts.lede(Material.read([lora])) == f"A LoRA on {model}"
    assert facts.lede(Material.read([network])) == f"The denoising network of {model}"


def test_every_file_is_read_once(runs: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    read: Counter[str] = Counter()
    whole = Path.read_text

    def read_text(path: Path, *arguments: Any, **options: Any) -> str:
        if path.parent == runs[0]:
            read[path.name] += 1
        return whole(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", read_text)
    render(Material.read(runs[:1]))
    names = ("config.toml", "metrics.jsonl", "evaluations.jsonl", "exploration.jsonl", "environment.json")
    assert read == dict.fromkeys(names, 1)


def test_a_figure_that_is_no_number_is_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", iterations=4)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines[1] |= {"reward_mean": float("nan"), "memory_gib": float("nan")}
    write_lines(run / "metrics.jsonl", lines)
    material = Material.read([run])
    chart = curves.training_chart(material)
    assert chart is not None
    assert chart.xs == [64, 192, 256]
    assert [figure.value for figure in facts.costs(material, material.arms[0]) if figure.name == "peak memory"] == [
        "1.2 GiB"  # 1.25, to two digits
    ]


def test_a_run_that_stopped_early_is_told_from_one_that_goes_on(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", iterations=12, done=6)
    assert facts.progress(Material.read([run])) == "Not finished. run: iteration 6 of 12."
    (run / "lora").mkdir()
    (run / "lora" / "README.md").write_text("")
    assert facts.progress(Material.read([run])) == "Stopped early. run: iteration 6 of 12."
    assert facts.progress(Material.read([make_run(tmp_path / "whole")])) == ""


def test_words_are_pooled_over_iterations_and_seeds(runs: list[Path]) -> None:
    (table,) = words.tables(Material.read(runs))
    assert table.label == "DDPO + DiffExp"
    # six iterations (until = 0.75 of 8) and two seeds of the same record
    found = {word.text: word for word in table.shown}
    assert {text: word.weighted.count for text, word in found.items()} == {"bike": 240, "a": 96, "cat": 48}
    assert found["bike"].difference == pytest.approx(0.5 + 0.3)
    assert found["bike"].weighted.mean_reward == pytest.approx(6.6)
    assert found["bike"].margin == pytest.approx(1.96 * (1 / 240 + 1 / 144) ** 0.5)
    assert [word.text for word in table.shown] == ["bike", "cat", "a"]
    assert table.samples == 384
    assert [word.text for word in table.clear] == ["bike"]  # "a" is at -0.2 ± 0.23


def test_clear_words_come_first_even_where_others_were_weighted_more_often() -> None:
    count = words.SHOWN + 1
    columns = {
        "word": [*(f"word {k}" for k in range(count)), "rare", "bad"],
        "weighted": [50] * count + [20, 20],
        "reward": [7.0] * count + [9.5, 4.25],
        "advantage": [0.01 * k for k in range(count)] + [2.0, -2.0],
        "other": [50] * (count + 2),
        "other_reward": [7.0] * (count + 2),
        "other_advantage": [0.0] * (count + 2),
    }
    table = words.table("x", [columns])
    assert table is not None
    assert [word.text for word in table.shown][:3] == ["rare", "bad", "word 12"]
    assert len(table.shown) == words.SHOWN
    assert [word.text for word in table.clear] == ["rare", "bad"]
    assert table.places == 2  # as 9.50 has


def test_words_of_records_without_the_other_side() -> None:
    one = {"word": ["cat"], "weighted": [4], "reward": [1.0], "advantage": [0.0]}
    table = words.table("x", [{**one, "other": [0], "other_reward": [None], "other_advantage": [None]}])
    assert table is not None
    assert not table.shown
    assert [(word.text, word.difference) for word in table.rest] == [("cat", None)]
    assert words.table("x", []) is None


def test_guidance_is_drawn_as_recorded_or_else_as_the_recipe_says(tmp_path: Path) -> None:
    recorded = curves.guidance_chart(Material.read([make_run(tmp_path / "new")]))
    assert recorded is not None
    assert recorded.xs == [0, 1000 - 881, 1000]
    plain, explored = recorded.lines
    assert (list(plain.values), list(explored.values)) == ([5, 5, 5], [1, 5, 5])
    old = make_run(tmp_path / "old")
    (old / "exploration.jsonl").unlink()
    from_recipe = curves.guidance_chart(Material.read([old]))
    assert from_recipe is not None
    assert (from_recipe.xs, list(from_recipe.lines[1].values)) == ([0, 100, 1000], [1, 5, 5])
    assert curves.guidance_chart(Material.read([make_run(tmp_path / "plain", explores=False)])) is None


def test_the_film_shows_the_same_tiles_at_every_moment(runs: list[Path]) -> None:
    found = film.film(Material.read(runs))
    assert found is not None
    assert [(tile.prompt, tile.seen) for tile in found.tiles][1:] == [("a dog playing chess", True), (UNSEEN[0], False)]
    assert [[moment.iteration for moment in reel.moments] for reel in found.reels] == [[0, 2, 4, 6, 8]] * 2
    assert [stop["queries"] for stop in found.stops] == [0, 128, 256, 384, 512]
    assert found.stops[2]["shown"] == [2, 2]
    assert found.stops[2]["label"] == "iteration 4, 256 queries"
    evaluated = Material.read(runs).first.run.scores[Measure(SEEN, GOAL)][2]["mean"]
    assert f"DDPO: {GOAL} {evaluated:.3f}, {JUDGE} (held out)" in found.stops[2]["scores"][0]
    uri = found.reels[0].moments[1].images[1]
    with Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/webp;base64,")))) as image:
        assert image.convert("RGB").getpixel((3, 3)) == (8, 40, 128)  # without loss, as it is small
    assert found.base == found.reels[0].moments[0].images


def test_a_film_keeps_both_ends_when_it_is_thinned(tmp_path: Path) -> None:
    material = Material.read([make_run(tmp_path / "run", iterations=60, every=1, evaluated=False)])
    whole = film.film(material)
    assert whole is not None
    moments = [moment.iteration for moment in whole.reels[0].moments]
    assert (len(moments), moments[0], moments[-1]) == (film.MOMENTS, 0, 60)
    one = sum(map(len, whole.reels[0].moments[0].images))
    small = film.film(material, budget=5 * one)
    assert small is not None
    assert small.thinned
    moments = [moment.iteration for moment in small.reels[0].moments]
    assert 2 <= len(moments) <= 5
    assert (moments[0], moments[-1]) == (0, 60)


def test_large_images_are_shrunk(tmp_path: Path) -> None:
    found = film.film(Material.read([make_run(tmp_path / "run", side=400, iterations=2)]))
    assert found is not None
    data = base64.b64decode(found.base[0].partition(",")[2])
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.size, found.side) == ("WEBP", (256, 256), 256)


def test_long_curves_are_thinned_to_what_a_screen_shows(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", iterations=3000, every=1000)
    material = Material.read([run])
    chart = curves.training_chart(material)
    assert chart is not None
    assert len(chart.xs) == charts.POINTS
    assert (chart.xs[0], chart.xs[-1]) == (64, 3000 * 64)
    rows = chart.rows()
    assert len(rows) == charts.ROWS
    assert chart.thinned
    assert (rows[0][0], rows[-1][0]) == ("64", "192,000")
    assert len(render(material)) < 8_000_000


def test_the_page_needs_nothing_and_allows_nothing_else(runs: list[Path]) -> None:
    text = render(Material.read(runs))
    document = Document(text)
    rules = document.rules()
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    assert "unsafe" not in str(rules)
    assert "connect-src" not in rules
    for tag, attributes, content in document.inline:
        if attributes.get("type") != "application/json":
            digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
            assert f"'sha256-{digest}'" in rules[f"{tag}-src"]
    for tag, attributes in document.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag
        for name in ("src", "href", "action", "srcset"):
            assert re.match(r"(data:|#|$)", attributes.get(name) or ""), (tag, attributes)
    assert Document(render(Material.read(runs), etag='"1"')).rules() == {**rules, "connect-src": "'self'"}


EVIL = ('<b>bold</b> & "quoted" </script><script>alert(1)</script>', "two\u2028lines <!--")


def test_prompts_are_text_wherever_they_stand(tmp_path: Path) -> None:
    text = render(Material.read([make_run(tmp_path / "run", prompts=EVIL)]))
    document = Document(text)
    assert text.count("<script") == 3  # the data and the two of our own
    assert "<b>bold" not in text
    assert next(a["alt"] for tag, a in document.tags if tag == "img") == f"{EVIL[0]}: untouched model"
    assert document.data()["film"]["stops"]


def test_embedded_json_ends_no_script_and_no_line() -> None:
    data = {"a": "</script><!--\u2028\u2029&'", "b": [1.5, None]}
    text = embedded(data)
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == data


@pytest.mark.parametrize("algorithm", ["ddpo", "alignprop"])
def test_a_run_that_has_only_begun(tmp_path: Path, algorithm: str) -> None:
    run = make_run(tmp_path / "run", algorithm=algorithm, done=0, evaluated=False, prompts=())
    for name in ("metrics.jsonl", "exploration.jsonl", "environment.json"):
        (run / name).unlink()
    text = render(Material.read([run]))
    assert "Not finished. run: iteration 0 of 8." in text
    assert "Nothing has been evaluated yet." in text
    assert "There are no previews" in text
    assert Document(text).data()["film"] is None


def test_a_single_iteration(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", iterations=1, done=1, every=10, explores=False)
    document = Document(render(Material.read([run])))
    assert document.data()["charts"][0]["xs"] == [0, 64]
    assert [stop["label"] for stop in document.data()["film"]["stops"]] == [
        "untouched model",
        "iteration 1, 64 queries",
    ]


def test_runs_with_different_goals_stand_side_by_side(tmp_path: Path) -> None:
    one = make_run(tmp_path / "one")
    two = make_run(tmp_path / "two", reward="emoji-aesthetic", held_out=None)
    text = render(Material.read([one, two]))
    assert "on several rewards" in text
    assert "Outcome by arm" not in text


def test_a_report_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    reward = tmp_path / "secret" / "mine.py"
    reward.parent.mkdir()
    reward.write_text("def redness(images, prompts):\n    return images[:, 0].mean((1, 2))\n")
    run = make_run(tmp_path / "run", reward=f"{reward}:redness")
    text = render(Material.read([run]))
    assert "mine.py:redness" in text
    assert str(tmp_path) not in text


def test_a_line_that_is_just_written_is_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    before = render(Material.read([run]))
    for name in ("metrics.jsonl", "evaluations.jsonl", "exploration.jsonl"):
        with (run / name).open("a") as file:
            file.write('{"iteration": 9, "que')
    assert render(Material.read([run])) == before


def test_training_writes_its_report(sd_folder: Path, tmp_path: Path) -> None:
    run = train(
        recipe(sd_folder, **{"evaluation.prompts": ["text:a cat riding a bike", "text:a dog"]}), tmp_path / "run"
    )
    document = Document((run / "report.html").read_text(encoding="utf-8"))
    assert len(document.data()["film"]["stops"]) == 3


class Failing:
    def __call__(self, *_: Any) -> None:
        raise RuntimeError("no report today")


def test_a_report_that_fails_ends_no_training(sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffexp.report.write", Failing())
    run = train(recipe(sd_folder, iterations=1), tmp_path / "run")
    assert (run / "lora" / "README.md").is_file()
    assert not (run / "report.html").exists()


def test_the_command(runs: list[Path], tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["report", str(runs[0])])
    assert result.exit_code == 0, result.output
    assert "report.html" in result.output
    assert (runs[0] / "report.html").is_file()
    out = tmp_path / "deep" / "all.html"
    result = CliRunner().invoke(app, ["report", *map(str, runs), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert out.is_file()
    assert [path.name for path in out.parent.iterdir()] == ["all.html"]


def test_mistakes_of_the_command(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--out FILE"):
        write(runs)
    with pytest.raises(UserError, match="not a run folder"):
        write([tmp_path])
    with pytest.raises(UserError, match="the same recipe with the same seed"):
        write([runs[0], runs[0]], tmp_path / "x.html")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't write there"):
        write(runs[:1], tmp_path / "file" / "x.html")


def test_a_comparison_writes_its_report(runs: list[Path], tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["compare", *map(str, runs), "--out", str(tmp_path / "comparison")])
    assert result.exit_code == 0, result.output
    assert "Outcome by arm" in (tmp_path / "comparison" / "report.html").read_text(encoding="utf-8")


@pytest.fixture
def server(runs: list[Path]) -> Iterator[Server]:
    running = serve(runs[:1], port=0)
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield running
    running.shutdown()
    running.server_close()
    thread.join()


def ask(server: Server, method: str = "GET", path: str = "/", **headers: str) -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=30)
    try:
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read().decode()
    finally:
        connection.close()


def test_the_server_answers_for_its_page_only(server: Server) -> None:
    assert server.server_address[0] == "127.0.0.1"
    status, headers, text = ask(server)
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert f'data-etag="{headers["ETag"].replace(chr(34), "&#34;")}"' in text
    assert ask(server, path="/?x=1")[0] == 200
    for path in ("/config.toml", "/..%2f..%2fetc/passwd", "/report.html"):
        assert ask(server, path=path)[0] == 404
    for method in ("POST", "PUT", "DELETE", "HEAD", "OPTIONS"):
        assert ask(server, method)[0] == 501
    assert ask(server, Host="attacker.example")[0] == 403
    assert ask(server, Host=f"localhost:{server.server_address[1]}")[0] == 200


def test_the_server_sends_a_page_again_only_when_the_run_went_on(server: Server, runs: list[Path]) -> None:
    tag = ask(server)[1]["ETag"]
    status, _, text = ask(server, If_None_Match=tag)
    assert (status, text) == (304, "")
    lines = [json.loads(line) for line in (runs[0] / "metrics.jsonl").read_text().splitlines()]
    write_lines(runs[0] / "metrics.jsonl", [*lines, {**lines[-1], "iteration": 9, "queries": 9 * 64}])
    status, headers, _ = ask(server, If_None_Match=tag)
    assert status == 200
    assert headers["ETag"] != tag
    (runs[0] / "config.toml").write_text("not = [toml")  # as if it were just being written
    assert ask(server, If_None_Match=headers["ETag"])[0] == 304


def test_a_port_that_is_taken(server: Server, runs: list[Path]) -> None:
    port = server.server_address[1]
    with pytest.raises(UserError, match=rf"--port {port}: can't listen there"):
        serve(runs[:1], port)
