"""The pictures of a report: what they draw is what the results hold."""

import dataclasses
import html
import re
from pathlib import Path
from xml.etree import ElementTree

import plotly.graph_objects as go
import pytest

from deepdelta.lab.analysis.results import RewriteSummary
from deepdelta.lab.measure.rewrites import GATE_BINS
from deepdelta.lab.views import figures as pictures
from deepdelta.lab.views.drawing import told
from deepdelta.lab.views.page import render_page
from deepdelta.lab.views.plot import plot, study_figure
from report_samples import HOSTILE, Page, anew, bare, many_seeds, plain, run, study


def test_pictures_are_valid_and_each_has_its_place() -> None:
    page = Page(render_page(many_seeds()))
    assert set(page.data) <= set(page.ids) and len(set(page.ids)) == len(page.ids)
    assert {"difference", "curves", "gates-1", "gates-2", "discrepancy-1", "cosine", "state_norm"} <= set(page.data)
    for figure in page.data.values():
        go.Figure(figure)  # raises on any property that plotly.js does not know


def test_every_picture_is_told_in_words_with_the_numbers_that_it_draws() -> None:
    results = many_seeds()
    alternatives = re.findall(r'class="plot"[^>]*aria-label="([^"]*)"', render_page(results))
    assert len(alternatives) == len(Page(render_page(results)).data) and len(set(alternatives)) == len(alternatives)
    mean = results.against_baseline()[0].comparison.mean
    assert f"mean {mean:.4g} ({HOSTILE})" in told(pictures.differences(results))
    curve = pictures.mean_curve(results.conditions[0], pictures.axes(results)[0], "validation")
    (start, first), (end, last) = next(iter(curve.values())), list(curve.values())[-1]
    assert f"additive {first:.4g} at {start:.3g}, {last:.4g} at {end:.3g}" in told(pictures.loss_curves(results))
    assert "mean gate 1.25 (0 attention)" in told(pictures.gate_heatmap(results, results.conditions[1]))


def test_what_lies_over_depth_is_what_the_rewrites_say() -> None:
    figure = plain(pictures.over_depth(study(), "cosine", "cos"))
    assert [trace["name"] for trace in figure["data"]] == [html.escape(HOSTILE), "write only"]
    assert figure["data"][0]["x"] == [0.0625] * 4 and figure["data"][0]["y"][0] == "0 attention"
    assert pictures.over_depth(bare(), "cosine", "cos") is None


def test_differences_show_every_seed_the_mean_and_the_interval() -> None:
    results = many_seeds()
    comparison = results.against_baseline()[0].comparison
    figure = plain(pictures.differences(results))
    assert comparison.t_interval is not None
    dots, mean = figure["data"][:2]
    base, better = results.conditions[0].losses(), results.conditions[1].losses()
    assert dots["x"] == [better[seed] - base[seed] for seed in results.seeds]
    assert mean["x"] == [comparison.mean]
    reach = mean["error_x"]
    assert mean["x"][0] - reach["arrayminus"][0] == pytest.approx(comparison.t_interval.low)
    assert mean["x"][0] + reach["array"][0] == pytest.approx(comparison.t_interval.high)
    spans = {(shape["x0"], shape["x1"]) for shape in figure["layout"]["shapes"]}
    assert comparison.smallest_resolvable is not None
    assert (-comparison.smallest_resolvable, comparison.smallest_resolvable) in spans


def test_the_plot_shows_every_seed_the_mean_the_interval_and_every_condition() -> None:
    results = many_seeds()
    names = [one.name for one in results.conditions]
    figure = study_figure(results)
    changes, flops, seconds, moved = (axes for axes in figure.axes if axes.get_legend_handles_labels()[0] or axes.lines)
    lines = iter([(list(line.get_xdata()), set(line.get_ydata())) for line in changes.lines])
    for row, one in enumerate(results.against_baseline()):
        losses, base = results.condition(one.condition).losses(), results.conditions[0].losses()
        interval = one.comparison.t_interval
        assert interval is not None
        assert next(lines) == ([interval.low, interval.high], {row})
        assert next(lines) == (pytest.approx([losses[seed] - base[seed] for seed in losses]), {row})
        assert next(lines) == ([one.comparison.mean], {row})
    assert [line.get_text() for line in changes.get_yticklabels()] == names[1:]
    for axes, place in ((flops, 40 * 2048 * 4.9e6), (seconds, 4.0), (moved, 40 * 2048 * 250_000)):
        assert [line.get_label() for line in axes.lines] == names
        assert axes.lines[0].get_xdata()[-1] == pytest.approx(place)
        assert axes.lines[0].get_ydata()[-1] == pytest.approx(
            sum(run.validation_loss + 0.2 for run in results.conditions[0].runs) / 6
        )


def test_the_plot_as_text_loads_nothing_and_is_the_same_twice() -> None:
    text = plot(many_seeds())
    assert text == plot(many_seeds())
    tree = ElementTree.fromstring(text)  # no markup of a name ends an element
    texts = [element.text for element in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert texts.count(HOSTILE) == 2 and texts.count("additive") == 1  # a row and the legend; the legend
    assert not any(element.tag.endswith(("script", "image", "metadata")) for element in tree.iter())
    assert not re.findall(r"https?://(?!www\.w3\.org/)", text)


def test_the_plot_of_odd_names_and_of_nothing() -> None:
    """What matplotlib would read as mathematics, or leave out of a legend, is drawn as it is."""
    names = ["additive", "$\\frac{a}$", "_hidden"]
    tree = ElementTree.fromstring(plot(study({name: [1.7, 1.6] for name in names})))
    texts = [(element.text or "").lstrip("\u200b") for element in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert [texts.count(name) for name in names] == [1, 2, 2]
    ElementTree.fromstring(plot(bare()))


def test_loss_curves_lie_on_steps_flops_seconds_and_bytes() -> None:
    results = study()
    slow = dataclasses.replace(results.conditions[1], runs=tuple(run(seed, 1.7, late=float(seed)) for seed in range(3)))
    results = anew(results, conditions=(results.conditions[0], slow))
    expected = {
        "steps": [0, 10, 20, 30, 40],
        "flops": [step * 2048 * 4.9e6 * 1.1 for step in (0, 10, 20, 30, 40)],
        "seconds": [1.0, 2.0, 3.0, 4.0, 5.0],  # seeds start 0, 1 and 2 seconds late: 1 on average
        "bytes": [step * 2048 * 250_001 for step in (0, 10, 20, 30, 40)],
    }
    figure = plain(pictures.loss_curves(results))
    mean = figure["data"][-1]
    assert [key for key, _ in figure["layout"]["meta"]["axes"]] == list(expected)
    for key, places in expected.items():
        assert ({"steps": mean["x"]} | mean["meta"]["x"])[key] == pytest.approx(places, rel=1e-5)
    assert mean["y"] == pytest.approx([1.7 + 50 / (step + 10) - 0.5 for step in (0, 10, 20, 30, 40)], rel=1e-5)
    # The start, five times as high, does not set the range.
    assert figure["layout"]["yaxis"]["range"][1] < 3.5
    # Of one condition they were not counted.
    uncounted = dataclasses.replace(slow, cost=dataclasses.replace(slow.cost, moved_bytes=None))
    results = anew(results, conditions=(results.conditions[0], uncounted))
    assert [axis.key for axis in pictures.axes(results)] == ["steps", "flops", "seconds"]
    assert "No axis of bytes moved" in Page(render_page(results)).visible


def test_curves_fall_back_to_training_loss_and_say_so() -> None:
    results = study()
    conditions = [
        dataclasses.replace(
            c,
            runs=tuple(
                dataclasses.replace(r, curve=tuple(dataclasses.replace(p, validation_loss=None) for p in r.curve))
                for r in c.runs
            ),
        )
        for c in results.conditions
    ]
    results = anew(results, conditions=tuple(conditions))
    assert pictures.measured_loss(results) == "train"
    page = Page(render_page(results))
    assert page.data["curves"]["layout"]["yaxis"]["title"]["text"] == "training loss (nats)"
    assert "Training loss falls" in page.visible


def test_gate_heatmap_holds_shares_over_zero_to_two() -> None:
    results = study()
    figure = plain(pictures.gate_heatmap(results, results.conditions[1]))
    heat, means = figure["data"]
    assert heat["z"][0] == pytest.approx([count / 190 for count in range(20)])
    assert heat["x0"] - heat["dx"] / 2 == 0 and heat["x0"] + heat["dx"] * (GATE_BINS - 0.5) == pytest.approx(2)
    assert heat["zmax"] == pytest.approx(19 / 190)
    assert means["x"] == [1.25] * 4
    assert [shape["x0"] for shape in figure["layout"]["shapes"]] == [0, 1, 2]
    assert pictures.gate_heatmap(results, results.conditions[0]) is None
    empty = dataclasses.replace(
        results.conditions[1],
        rewrites=(RewriteSummary(layer=0, sublayer="mlp", gate_histogram=(0,) * GATE_BINS, gate_mean=None),),
    )
    assert plain(pictures.gate_heatmap(results, empty))["data"][0]["z"] == [[0.0] * GATE_BINS]


def test_discrepancies_join_before_and_after() -> None:
    results = study()
    figure = plain(pictures.discrepancies(results, results.conditions[1]))
    line, before, after = figure["data"]
    assert line["x"][:3] == [0.75, 0.125, None]
    assert (before["x"], after["x"]) == ([0.75] * 4, [0.125] * 4)
    assert before["y"] == ["0 attention", "0 mlp", "1 attention", "1 mlp"]
    assert pictures.discrepancies(results, results.conditions[0]) is None


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_colours_can_be_seen_on_light_and_dark_and_looks_do_not_repeat() -> None:
    style = (Path(pictures.__file__).parent / "templates" / "report.css").read_text(encoding="utf-8")
    cards = re.findall(r"--card: (#[0-9a-f]{6})", style)
    assert len(cards) == 2
    for colour in (pictures.BASELINE_COLOUR, *pictures.COLOURS):
        for card in cards:
            dark, light = sorted((luminance(colour), luminance(card)))
            assert (light + 0.05) / (dark + 0.05) >= 3, (colour, card)
    results = study({"additive": [1.7], **{f"c{number}": [1.7] for number in range(40)}})
    assert len({(look.colour, look.dash) for look in pictures.looks(results).values()}) == 41
