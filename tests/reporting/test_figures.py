import itertools
import re
import xml.etree.ElementTree as ET

import numpy as np
import pandas as pd
import pytest

from m2l.reporting import blocks, figures, merging_at_scale_report, style

SIZES, COUNTS = ["1B", "8B", "24B", "64B"], [2, 4, 6, 8]
METHODS = ["average", "task_arithmetic", "dare_ties", "ties"]


def values(frame, column, **where):
    """A column of the rows that `where` names, in the frame's order."""
    for name, value in where.items():
        frame = frame[frame[name] == value]
    return list(frame[column])


def panel(figure, title):
    (found,) = [axis for axis in figure.axes if axis.get_title() == title]
    return found


def line(axis, label):
    (found,) = [line for line in axis.get_lines() if line.get_label() == label]
    return list(found.get_xdata()), list(found.get_ydata())


def heights(axis):
    """By label, the heights of a panel's bars from left to right."""
    return {bars.get_label(): [bar.get_height() for bar in bars] for bars in bar_groups(axis)}


def bar_groups(axis):
    return [container for container in axis.containers if hasattr(container, "patches")]


def test_the_radar_has_a_spoke_for_each_size_and_method_and_closes(paper_frame):
    figure = figures.radar(paper_frame)
    assert len(figure.axes) == 2
    for axis, count in zip(figure.axes, (2, 8), strict=True):
        for base in style.BASES:
            angles, drawn = line(axis, style.base_name(base))
            expected = [
                values(paper_frame, "held_in", size=s, base=base, method=m, experts=count)[0]
                for s in SIZES
                for m in [*METHODS, "multitask"]
            ]
            assert drawn == [*expected, expected[0]]
            assert np.all(np.diff(angles) > 0) and angles[-1] - angles[0] == pytest.approx(
                2 * np.pi
            )
        _, circle = line(axis, "Task's expert")
        assert set(circle) == {1.0}
    assert len(figures.radar(paper_frame, experts=[4]).axes) == 1


@pytest.mark.parametrize("base", style.BASES)
def test_generalization_draws_the_held_out_tables(paper_frame, base):
    figure = figures.generalization(paper_frame, base)
    assert len(figure.axes) == len(SIZES)
    for size in SIZES:
        axis = panel(figure, f"{style.base_name(base)}, {size}")
        for method in ("task_arithmetic", "ties", "multitask"):
            expected = values(paper_frame, "held_out", size=size, base=base, method=method)
            assert line(axis, style.method_name(method)) == (COUNTS, expected)
        assert "Average" not in {drawn.get_label() for drawn in axis.get_lines()}


def test_generalization_draws_what_there_is_where_the_papers_methods_are_not(paper_frame):
    frame = paper_frame[paper_frame["method"].isin(["average", "multitask"])]
    axis = figures.generalization(frame, "instruct").axes[0]
    labels = {drawn.get_label() for drawn in axis.get_lines()}
    assert {"Average", "Multitask"} <= labels


def test_by_base_has_a_panel_for_each_number_of_experts(paper_frame):
    figure = figures.by_base(paper_frame)
    assert [axis.get_title() for axis in figure.axes] == [f"{count} experts" for count in COUNTS]
    for axis, count in zip(figure.axes, COUNTS, strict=True):
        drawn = {
            points.get_label(): list(points.lines[0].get_ydata()) for points in axis.containers
        }
        assert drawn == {
            f"{style.base_name(base)}, {style.method_name(method)}": values(
                paper_frame, "held_in", base=base, method=method, experts=count
            )
            for base in style.BASES
            for method in METHODS
        }


def test_by_size_has_the_papers_three_panels(paper_frame):
    figure = figures.by_size(paper_frame)
    panels = [("pretrained", 2), ("instruct", 2), ("instruct", 8)]
    for axis, (base, count) in zip(figure.axes, panels, strict=True):
        assert axis.get_title() == f"{style.base_name(base)}, {count} experts"
        merged = paper_frame[paper_frame["method"] != "multitask"]
        assert heights(axis) == {
            size: values(merged, "held_in", size=size, base=base, experts=count) for size in SIZES
        }


@pytest.mark.parametrize("method", METHODS)
def test_more_experts_draws_one_method_for_both_bases_held_in_and_held_out(paper_frame, method):
    figure = figures.more_experts(paper_frame, method)
    assert len(figure.axes) == 4
    for base in style.BASES:
        for column in ("held_in", "held_out"):
            axis = panel(figure, f"{style.base_name(base)},\n{column.replace('_', '-')}")
            for size in SIZES:
                expected = values(paper_frame, column, size=size, base=base, method=method)
                assert line(axis, size) == (COUNTS, expected)


def test_methods_at_scale_draws_the_largest_instruction_tuned_models(paper_frame):
    figure = figures.methods_at_scale(paper_frame)
    for axis, column in zip(figure.axes, ("held_in", "held_out"), strict=True):
        assert "64B" in axis.get_title()
        assert heights(axis) == {
            style.method_name(method): values(
                paper_frame, column, size="64B", base="instruct", method=method
            )
            for method in METHODS
        }


def test_bands_are_drawn_where_there_are_any_and_only_there(paper_frame, banded):
    for draw in (figures.radar, figures.more_experts):
        assert not any(axis.collections for axis in draw(paper_frame).axes)
        assert all(axis.collections for axis in draw(banded).axes)
    shade = figures.more_experts(banded).axes[0].collections[0].get_paths()[0].vertices[:, 1]
    expected = banded[
        (banded["size"] == "1B")
        & (banded["base"] == "pretrained")
        & (banded["method"] == "task_arithmetic")
    ]
    assert shade.min() == expected["held_in_low"].min()
    assert shade.max() == expected["held_in_high"].max()
    for draw in (figures.by_size, figures.methods_at_scale):
        for frame, drawn in ((paper_frame, False), (banded, True)):
            groups = [group for axis in draw(frame).axes for group in bar_groups(axis)]
            assert all((group.errorbar is not None) == drawn for group in groups)
    bars = bar_groups(figures.by_size(banded).axes[0])[0]
    low, high = bars.errorbar.lines[2][0].get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((0.63 - 0.02, 0.63 + 0.05))


def frames_of_other_shapes(frame):
    one_count = frame[(frame["size"] == "1B") & (frame["experts"] == 4)]
    two_methods = frame[frame["method"].isin(["ties", "average"])]
    new = [frame[frame["method"] == "ties"].assign(method=f"method_{i}") for i in range(8)]
    gaps = frame.copy()
    gaps.loc[::3, ["held_in", "held_out"]] = np.nan
    yield from (one_count, two_methods, pd.concat([frame, *new]), gaps)
    yield frame[(frame["size"] == "1B") & frame["experts"].isin([2, 4])]


def test_any_number_of_sizes_counts_and_methods_can_be_drawn(banded):
    for frame in frames_of_other_shapes(banded):
        for figure in merging_at_scale_report.paper_figures(frame).values():
            figure.canvas.draw()


def test_no_two_methods_look_alike():
    names = [*METHODS, *(f"method_{i}" for i in range(6)), "multitask"]
    looks = [tuple(style.method_style(name, names).values()) for name in names]
    assert len(set(looks)) == len(names)


def test_gains_draws_the_largest_size_unless_told_otherwise(experts):
    for size, figure in (("64B", figures.gains(experts)), ("1B", figures.gains(experts, "1B"))):
        for base in style.BASES:
            axis = panel(figure, f"{style.base_name(base)}, {size}")
            for label, column in (("base", "before"), ("expert", "expert")):
                drawn, _ = line(axis, label)
                assert drawn == values(experts, column, size=size, base=base)


def test_a_sweeps_line_is_the_best_at_each_scale_and_its_star_what_was_chosen(choices):
    figure = figures.sweeps(choices, "instruct")
    assert len(figure.axes) == 3 * 2
    for axis in figure.axes:
        for count in (2, 4):
            scales, scores = line(axis, f"{count} experts")
            assert scales == [0.25, 0.5, 1.0]
            assert scores == pytest.approx([0.9 - abs(scale - 1 / count) for scale in scales])
        stars = [drawn for drawn in axis.get_lines() if drawn.get_marker() == "*"]
        assert [float(star.get_xdata()[0]) for star in stars] == [0.5, 0.25]


def test_the_same_frame_gives_the_same_bytes_in_every_format(banded, tmp_path):
    for place in ("a", "b"):
        figures.write(figures.more_experts(banded), tmp_path / place, "figure")
    for ending in ("svg", "pdf", "png"):
        first, second = ((tmp_path / place / f"figure.{ending}").read_bytes() for place in "ab")
        assert first == second
    ET.parse(tmp_path / "a" / "figure.svg")


def test_a_narrow_figure_has_all_panels_below_each_other_with_their_labels(banded):
    figure = figures.more_experts(banded)
    narrow = figures.narrowed(figure)
    assert narrow.get_figwidth() < 4 < figure.get_figwidth()
    narrow.draw_without_rendering()
    boxes = [axis.get_position() for axis in narrow.axes]
    assert all(below.y1 < above.y0 for above, below in itertools.pairwise(boxes))
    wide = [axis.get_title() for axis in figure.axes]
    assert [axis.get_title() for axis in narrow.axes] == wide
    ends = ["1 = the task's expert"] * 2 + ["1 = the base model"] * 2
    assert [axis.get_ylabel().splitlines()[-1] for axis in narrow.axes] == ends


def test_values_of_points_and_bars_are_those_of_the_frame(banded):
    base, largest = style.bases(banded)[-1], style.sizes(banded)[-1]
    frame = banded[(banded["base"] == base) & (banded["size"] == largest)]
    frame = frame[frame["method"] != style.MULTITASK]
    texts = [
        text for each in figures.values(figures.methods_at_scale(banded)).values() for text in each
    ]
    assert sorted(texts) == sorted(
        f"{style.method_name(row.method)}, {row.experts}: {getattr(row, column):.3g}"
        for row in frame.itertuples()
        for column in ("held_in", "held_out")
    )


def drawn(document, sheet):
    """(tag, text, style, coordinates) of all that an svg document draws, in its order."""
    rows, styles = [], {}
    for element in ET.fromstring(re.sub(r' xmlns(:\w+)?="[^"]*"|xlink:', "", document)).iter():
        text = element.get("style") or sheet.get(element.get("class"), "")
        style = dict(part.split(": ", 1) for part in text.split("; ") if part)
        style.pop("font-family", None)
        styles[f"#{element.get('id')}"] = style
        if element.tag in ("path", "use", "text"):
            # What is used has its own style first.
            style = style | styles.get(element.get("href"), {})
            places = " ".join(element.get(name, "") for name in ("d", "x", "y"))
            numbers = [float(number) for number in re.findall(r"-?\d+\.?\d*", places)]
            rows.append(((element.tag, (element.text or "").strip(), style), numbers))
    return rows


def test_a_figure_on_a_page_draws_what_matplotlib_drew_in_fewer_bytes(banded):
    element = blocks.svg(figures.by_size(banded), "by_size", "sizes")
    page = blocks.with_shared_styles(f"<style>\n</style>{element}")
    sheet = dict(re.findall(r"^  \.(\w+) { (.*) }$", page, re.M))
    whole = figures.svg(figures.by_size(banded))
    wide, narrow = re.findall(r"<svg.*?</svg>", page, re.S)
    assert len(wide) < 0.45 * len(whole)
    assert not re.search(r" style=|font-family", wide.partition(">")[2])
    ids = re.findall(r' id="(\w+)"', wide + narrow)
    assert len(ids) == len(set(ids)) and set(re.findall(r"#(\w+)", wide)) <= {*ids}
    for (one, numbers), (other, rounded) in zip(
        drawn(whole[whole.index("<svg") :], {}), drawn(wide, sheet), strict=True
    ):
        assert one == other
        # Of points: screens have about one pixel in each.
        np.testing.assert_allclose(rounded, numbers, atol=0.0501)
