import pytest

from m2l.reporting import figures, merge_to_learn_figures, merge_to_learn_report, style
from m2l.studies.merge_to_learn import METHODS

SKILLS = ["science", "safety", "coding"]


def lines(axis):
    """A panel's drawn lines as lists of (x, y)."""
    return [list(zip(*map(list, line.get_data()), strict=True)) for line in axis.get_lines()]


def points(frame, x, y, **where):
    for name, value in where.items():
        frame = frame[frame[name] == value]
    return list(zip(frame[x], frame[y], strict=True))


@pytest.fixture(scope="module")
def frame(skills_material):
    return skills_material.models


def stars(axis):
    return [line for line in axis.get_lines() if line.get_marker() == "*"]


def test_the_tradeoff_goes_along_w_from_the_general_model_to_what_is_mixed_in(frame):
    figure = merge_to_learn_figures.tradeoff(frame)
    assert [axis.get_title().lower() for axis in figure.axes] == SKILLS
    start = points(frame, "general", "science", regime="general")
    for method, end in (("task_arithmetic", None), ("linear", "ptm"), ("wise_ft", "cft")):
        models = frame[(frame["skills"] == "science") & (frame["part"] == 100)]
        along = models[models["method"] == method].sort_values("weight")
        assert along["weight"].is_monotonic_increasing and len(along) >= 5
        expected = start + points(along, "general", "science")
        expected += points(models, "general", "science", regime=end) if end else []
        assert expected in lines(figure.axes[0])


def test_a_star_is_at_the_heuristics_weight_of_each_method(frame):
    for axis, skill in zip(merge_to_learn_figures.tradeoff(frame).axes, SKILLS, strict=True):
        chosen = frame[frame["heuristic"] & (frame["part"] == 100) & (frame["skills"] == skill)]
        expected = {
            merge_to_learn_figures._LOOKS[model["method"]]["color"]: (
                model["general"],
                model[skill],
            )
            for _, model in chosen.iterrows()
        }
        found = {star.get_color(): (*star.get_xdata(), *star.get_ydata()) for star in stars(axis)}
        assert found == expected and len(found) == len(METHODS)


def test_refusals_are_drawn_as_safety_against_compliance(frame):
    (axis,) = merge_to_learn_figures.refusals(frame).axes
    drawn = lines(axis)
    for regime in ("cft", "rt", "ptm"):
        where = {"regime": regime, "skills": "safety", "part": 100}
        assert points(frame, "exaggerated_refusals", "safety", **where) in drawn
    assert axis.get_xlabel() == "safe look-alikes answered, %"


def test_cost_is_on_a_logarithmic_axis_beside_the_papers_own(frame, skills_material):
    papers = skills_material.papers_steps
    *scores, steps = merge_to_learn_figures.cost(frame, papers).axes
    for axis, skill in zip(scores, SKILLS, strict=True):
        assert axis.get_xscale() == "log"
        retrained = frame[(frame["regime"] == "rt") & (frame["skills"] == skill)]
        retrained = retrained.sort_values("part")
        both = (retrained["general"] + retrained[skill]) / 2
        assert list(zip(retrained["flops"], both, strict=True)) in lines(axis)
    heights = [bar.get_height() for bars in steps.containers for bar in bars]
    assert heights == [*papers["ptm"], *papers["cft"], *papers["rt"]]


@pytest.mark.parametrize("spread", [1.2, 2.1, 9, 500])
def test_a_cost_axis_has_some_ticks_that_differ_whatever_it_spans(frame, skills_material, spread):
    costs = frame["flops"].rank(pct=True)
    frame = frame.assign(flops=3.7e13 * spread**costs)
    figure = merge_to_learn_figures.cost(frame, skills_material.papers_steps)
    figure.draw_without_rendering()
    axis, (low, high) = figure.axes[0], figure.axes[0].get_xlim()
    labels = [
        label.get_text()
        for label, place in zip(axis.get_xticklabels(), axis.get_xticks(), strict=True)
        if low <= place <= high
    ]
    assert 2 <= len(set(labels)) == len(labels) <= 6


def test_data_curves_have_a_point_for_each_part_that_was_trained(frame):
    figure = merge_to_learn_figures.data_curves(frame)
    first = {line.get_label(): list(line.get_xdata()) for line in figure.axes[0].get_lines()}
    assert first["Continued fine-tuning"] == first["Merge, heuristic w"] == [20, 60, 100]
    assert first["Retraining"] == [20, 100]
    continued = frame[(frame["regime"] == "cft") & (frame["skills"] == "science")]
    continued = continued.sort_values("part")
    for axis, name in ((figure.axes[0], "science"), (figure.axes[3], "general")):
        assert points(continued, "part", name) in lines(axis)


def test_no_two_marks_look_alike_but_the_star_and_what_it_stands_for():
    looks = [tuple(look.values()) for look in merge_to_learn_figures._LOOKS.values()]
    assert len(set(looks)) == len(looks)
    colours = [colour for colour, marker in looks if marker != "*"]
    assert len(set(colours)) == len(colours)
    assert [style.method_name(name) for name in ("linear", "wise_ft")] == ["Linear", "WiSE-FT"]


def test_scores_without_errors_and_one_skill_alone_can_be_drawn(skills_material, frame):
    alone = frame[frame["skills"].isin(["", "general", "science"])]
    papers = skills_material.papers_steps
    for shown in (alone, frame.assign(science_error=float("nan"), general_error=float("nan"))):
        for figure in (
            merge_to_learn_figures.tradeoff(shown),
            merge_to_learn_figures.data_curves(shown),
            merge_to_learn_figures.cost(
                shown, papers[papers["skill"].isin(merge_to_learn_figures.skills_of(shown))]
            ),
        ):
            figure.canvas.draw()


def test_the_same_results_give_the_same_bytes(skills_material, tmp_path):
    for place in ("a", "b"):
        for name, figure in merge_to_learn_report.draw(skills_material).items():
            figures.write(figure, tmp_path / place, name)
    written = sorted((tmp_path / "a").iterdir())
    assert len(written) == 4 * 3
    for path in written:
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
