"""The report: the run's own figures, one file without a network, and drawn without a complaint."""

import json
import re
import shutil
from dataclasses import replace
from html import unescape
from pathlib import Path

import browser
import pytest
from conftest import run_command

from flashmorph.files import read_json, write_json
from flashmorph.report import write_report
from flashmorph.report.charts import Chart, Heat, Lines
from flashmorph.report.interactive import spec
from flashmorph.report.markup import percent
from flashmorph.report.source import read_run
from flashmorph.report.write import _plan, _sections


@pytest.fixture(scope="module")
def finished(tmp_path_factory, teacher_folder, recipe_file) -> Path:
    """A run with everything that a report can show."""
    run = tmp_path_factory.mktemp("runs") / "out"
    assert run_command("morph", teacher_folder, "--recipe", recipe_file, "--output", run) == 0
    assert "Recall at" not in (run / "report.html").read_text()
    compared = ("--budgets", 1, "--questions", 6, "--recall-questions", 0, "--seeds", 1)
    chosen = ("--strategies", "uniform,add-one,budgeted-gates+steps=3")
    assert run_command("compare", teacher_folder, "--recipe", recipe_file, "--output", run, *compared, *chosen) == 0
    uniform = run / "stages" / read_json(run / "flashmorph.json")["last"]["extend uniform"] / "model"
    asked = ("--lengths", "128", "--depths", 2, "--questions", 4, "--tokens", "--report", run)
    assert run_command("evaluate", teacher_folder, run, uniform, *asked) == 0
    return run


def charts_of(run: Path) -> dict[str, Chart]:
    blocks = [block for section in _sections(read_run(run)) for block in section.blocks]
    return {block.name: block for block in blocks if isinstance(block, Chart)}


def test_the_page_holds_the_runs_own_figures(finished):
    results = read_json(finished / "results.json")
    page = (finished / "report.html").read_text()
    text = unescape(re.sub(r"<[^>]+>", " ", page.split('<script type="application/json"')[0]))
    for name in ("teacher", "hybrid", "hybrid_undistilled", "uniform"):
        assert percent(results[name]["recall"]) in text and f"{results[name]['perplexity']:.2f}" in text
    assert "perplexity_tokens: 256" in text and "class of token" not in text
    drawn = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)
    assert drawn
    specs = json.loads(drawn[1])
    assert len(specs) == page.count('class="plot"')
    shown = {round(value, 6) for spec in specs for trace in spec["data"] for value in _numbers(trace.get("y"))}
    for part in results["hybrid"]["perplexity_by_position"]:
        assert round(part["perplexity"], 6) in shown
    steps = [entry for entry in read_json(next(finished.glob("stages/select-*/trace.json"))) if "logits" in entry]
    assert {round(entry["logits"][0], 6) for entry in steps} <= shown


def test_the_page_asks_for_nothing_else(finished):
    page = (finished / "report.html").read_text()
    ours = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.findall(r"https?://|@import|url\(|src\s*=", ours)
    assert set(re.findall(r'href="([^"]*)"', ours)) == {"data:,"}


def test_the_page_names_what_hovering_shows(finished):
    """A plan that was given has no scores, a window no branch that came near an attention."""
    source = read_run(finished)
    given = replace(source, plan=replace(source.plan, scores=[]))
    both = "Hover for scores and how near each layer's branch came to its attention."
    assert both in unescape(_plan(source)) and "Hover for how near" in unescape(_plan(given))
    assert "Hover for scores." in _plan(replace(source, align={}))
    assert "Hover" not in _plan(replace(given, align={}))


def test_every_source_has_its_chart_and_a_missing_one_leaves_it_out(finished, tmp_path):
    charts = charts_of(finished)
    assert {"scores", "gates", "regret", "recall", "grid_128", "perplexity", "tokens", "cache"} == set(charts)
    assert {f"{name}.png" for name in charts} <= {path.name for path in (finished / "figures").iterdir()}
    assert [panel.title for panel in charts["grid_128"].panels] == ["teacher", "hybrid", "uniform layout, same budget"]
    for chart in charts.values():
        assert chart.title and chart.note
        assert all(panel.x_label and panel.y_label for panel in chart.panels)
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    (copy / "evaluate.json").unlink()
    shutil.rmtree(copy / "compare")
    next(copy.glob("stages/select-*/trace.json")).unlink()
    assert set(charts_of(copy)) == {"scores", "recall", "perplexity", "cache"}
    assert "--tokens --report" in (write_report(copy)).read_text()


def test_results_of_earlier_versions_are_read(finished, tmp_path):
    """They have no version, no base model and no comparison with the teacher."""
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    results = read_json(copy / "results.json")
    for name in ("version", "base_model", "recall_hybrid_minus_teacher", "perplexity_hybrid_over_teacher"):
        del results[name]
    write_json(copy / "results.json", results)
    page = write_report(copy).read_text()
    assert f"teacher {percent(results['teacher']['recall'])}</span>" in page
    assert f"teacher {percent(results['teacher']['recall'])}: " in (finished / "report.html").read_text()


def test_a_best_known_plan_is_never_called_the_best(finished, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    compared = read_json(copy / "compare" / "compare.json")
    (budget, truth), rows = next(iter(compared["truths"].items())), compared["rows"]
    known = {"reference": "found", "best_known": truth["best"]}
    rows = [{**row, "rank": None, "regret": row["regret"] - 0.1} for row in rows]
    write_json(copy / "compare" / "compare.json", {**compared, "truths": {budget: known}, "rows": rows})
    chart = charts_of(copy)["regret"]
    assert "best known plan" in chart.title and "the best known plan's" in chart.note
    (panel,) = chart.panels
    assert panel.title.startswith(f"budget {budget}: best known ") and not panel.log_y
    assert min(value for series in panel.series for value in series.y) == min(row["regret"] for row in rows) < 0
    write_report(copy)


def test_heatmaps_show_each_cell_of_the_grid(finished):
    figures = read_json(finished / "evaluate.json")["models"]
    for name, panel in zip(figures, charts_of(finished)["grid_128"].panels, strict=True):
        assert isinstance(panel, Heat)
        for row, shown, all_of_it in zip(panel.rows, panel.values, panel.hover, strict=True):
            cells = next(each for each in figures[name]["grid"]["rows"] if each["task"] == row)
            depths = [100 * cell["recall"] for cell in cells["depths"]] or [None] * (len(panel.columns) - 1)
            assert shown == [*depths, 100 * cells["recall"]]
            assert f"{cells['questions']} questions" in all_of_it[-1]


def test_figures_of_an_earlier_hybrid_are_left_out_and_the_page_says_so(finished, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    kept = read_json(copy / "evaluate.json")
    write_json(copy / "evaluate.json", {**kept, "weights": {**kept["weights"], "hybrid": "0" * 12}})
    assert run_command("report", copy) == 0
    page = (copy / "report.html").read_text()
    assert "evaluate.json is about an earlier hybrid" in page and "Recall at 128 tokens" not in page


def test_speed_is_shown_where_it_was_measured(finished, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    rows = [{"median": 0.001 * length, "quartiles": [0.0009 * length, 0.0012 * length]} for length in (64, 128)]
    models = {name: {"prefill": {"by_length": rows}, "decode": {"by_length": rows}} for name in ("teacher", "hybrid")}
    machine = {"device": "cpu", "dtype": "float32", "threads": 1}
    write_json(copy / "bench.json", {"machine": machine, "settings": {"lengths": [64, 128]}, "models": models})
    chart = charts_of(copy)["speed"]
    assert chart.note.endswith("; cpu, float32, 1 thread.")
    reading, writing = chart.panels
    assert [list(series.y) for series in reading.series] == [[64, 128]] * 2 and writing.title != reading.title


def test_what_is_no_run_is_refused(finished, tmp_path, capsys):
    assert run_command("report", tmp_path) == 2
    assert "is no run of flashmorph's" in capsys.readouterr().err
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    (copy / "evaluate.json").write_text("[]")
    assert run_command("report", copy) == 2
    assert "does not hold what `flashmorph evaluate` finds" in " ".join(capsys.readouterr().err.split())
    (copy / "results.json").unlink()
    assert run_command("report", copy) == 2
    assert "has no results.json yet" in capsys.readouterr().err


def test_the_card_links_the_report(finished):
    card = (finished / "README.md").read_text()
    assert "(report.html)" in card and "points of recall" in card and "--recipe recipe.yaml --output" in card
    assert "base_model" not in card.split("---")[1] and "`base_model` (the teacher was read from this machine" in card


@pytest.mark.parametrize("most, powers", [(5.8e8, False), (5.8e9, True)])
def test_a_logarithmic_axis_marks_powers_of_ten_alone_only_where_one_lies_on_it(finished, most, powers):
    (panel,) = charts_of(finished)["regret"].panels
    assert isinstance(panel, Lines) and panel.log_x and not panel.x_ticks
    first = replace(panel.series[0], x=[1.1e8, most], y=[1e-4, 1e-2], hover=None)
    axis = spec(replace(panel, series=[first]))["layout"]["xaxis"]
    assert (axis.get("dtick") == 1) is powers and (axis.get("tickformat") == "~s") is not powers


@pytest.mark.skipif(browser.find() is None, reason="no Chromium here")
def test_chromium_draws_every_figure_without_a_complaint(finished, tmp_path):
    page_file = finished / "report.html"
    plots = page_file.read_text().count('class="plot"')
    pictures = set()
    with browser.open_page(tmp_path / "profile") as page:
        for width in browser.WIDTHS.values():
            for scheme in browser.SCHEMES:
                page.show(page_file, width, scheme)
                assert page.ask("document.documentElement.dataset.drawn") == str(plots)
                marks = ".plot .trace, .plot .hm image, .plot .heatmaplayer image"
                empty = f"[...document.querySelectorAll('.plot')].filter(n => !n.querySelector('{marks}')).length"
                assert page.ask(empty.replace(".plot .", ".")) == 0
                assert page.ask("document.querySelectorAll('.xtitle, .ytitle').length") == 2 * plots
                assert page.ask("document.documentElement.scrollWidth") <= width
                assert page.ask("innerWidth") == width
                pictures.add(page.picture())
        # On paper every figure is as wide as the paper at most, and dark on white.
        page.ask("dispatchEvent(new Event('beforeprint'))")
        assert page.ask("Math.max(...[...document.querySelectorAll('.main-svg')].map(n => n.clientWidth))") <= 700
        assert page.ask("document.querySelector('.xtitle').style.fill") == "rgb(28, 31, 36)"
        assert page.complaints == []
        assert {address.split(":")[0] for address in page.asked} <= {"file", "data"}
    assert len(pictures) == 4


def _numbers(values) -> list[float]:
    return [value for value in values or [] if isinstance(value, int | float)]
