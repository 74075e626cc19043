"""The paper's five findings, and what a study's own numbers say to each.

Source: Yadav et al., "What Matters for Model Merging at Scale?", sections 4.1 to 4.5.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from m2l.studies.aggregate import MULTITASK, REPLICATES, Replicates, interval

TEST = (
    f"95 % interval of a bootstrap over datasets and seeds ({REPLICATES:,} replicates, the same "
    "draw for every model): supported if all of it lies on the claim's side of 0, contradicted if "
    "all of it lies on the other, undecided otherwise"
)


@dataclasses.dataclass(frozen=True)
class Finding:
    """A claim of the paper beside a study's own numbers.

    Attributes:
        number: The paper's order.
        title: The claim in a few words.
        claim: What the paper says, in a sentence.
        statistic: What is measured, in words; above 0 is on the claim's side.
        value: The statistic.
        interval: Where it lies with 95 % confidence; NaN where the study cannot say.
        verdict: "supported", "contradicted" or "undecided"; "not tested" by a study that has no
            such comparison.
        sentence: What the study's numbers say.
        test: How the verdict was come by.
    """

    number: int
    title: str
    claim: str
    statistic: str
    value: float
    interval: tuple[float, float]
    verdict: str
    sentence: str
    test: str = TEST


def _finding(
    number: int,
    title: str,
    claim: str,
    statistic: str,
    replicates: np.ndarray | None,
    sentence: str,
) -> Finding:
    if replicates is None:
        nothing = (np.nan, np.nan)
        said = "This study has nothing to compare."
        return Finding(number, title, claim, statistic, np.nan, nothing, "not tested", said)
    low, high = interval(replicates)
    verdict = "supported" if low > 0 else "contradicted" if high < 0 else "undecided"
    value = float(replicates[0])
    said = f"{sentence} ({statistic}: {value:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}.)"
    return Finding(number, title, claim, statistic, value, (low, high), verdict, said)


def _mean(values: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Over axes, leaving out cells that a replicate has no dataset for."""
    with np.errstate(invalid="ignore"):
        present = np.isfinite(values)
        return np.where(present, values, 0).sum(axes) / present.sum(axes)


def _slope(values: np.ndarray, axis: int, along: np.ndarray) -> np.ndarray:
    """Of the least-squares line along an axis."""
    x = along - along.mean()
    return np.tensordot(np.moveaxis(values, axis, -1), x / (x**2).sum(), axes=1)


@dataclasses.dataclass(frozen=True)
class _Grid:
    """Arrays [replicates, sizes, bases, methods, counts]; the multitask models' without methods."""

    held_in: np.ndarray
    held_out: np.ndarray
    multitask_out: np.ndarray
    sizes: list[str]
    counts: list[int]
    instruct: int
    pretrained: int
    tripled: np.ndarray

    @classmethod
    def of(cls, grid: Replicates, parameters: Mapping[str, int]) -> "_Grid":
        methods = grid.axes["method"]
        merged = [i for i, method in enumerate(methods) if method != MULTITASK]
        return cls(
            held_in=grid.held_in[:, :, :, merged],
            held_out=grid.held_out[:, :, :, merged],
            multitask_out=grid.held_out[:, :, :, methods.index(MULTITASK)],
            sizes=grid.axes["size"],
            counts=grid.axes["experts"],
            instruct=grid.axes["base"].index("instruct"),
            pretrained=grid.axes["base"].index("pretrained"),
            tripled=np.log([parameters[size] for size in grid.axes["size"]]) / np.log(3),
        )

    def by_base(self, values: np.ndarray) -> tuple[float, float]:
        """The mean on the instruction-tuned base, and on the pretrained one."""
        bases = (self.instruct, self.pretrained)
        first, second = (float(_mean(values[:1, :, base], (1, 2, 3))[0]) for base in bases)
        return first, second


def findings(of: Replicates, parameters: Mapping[str, int]) -> list[Finding]:
    """The five findings, in the paper's order.

    Args:
        of: The study's grid.
        parameters: By size, how many parameters its models have.
    """
    grid = _Grid.of(of, parameters)
    return [
        _instruction_tuned(grid),
        _larger(grid),
        _generalisation(grid),
        _more_experts(grid),
        _alike(grid),
    ]


def _instruction_tuned(grid: _Grid) -> Finding:
    difference = grid.held_in[:, :, grid.instruct] - grid.held_in[:, :, grid.pretrained]
    instruct, pretrained = grid.by_base(grid.held_in)
    return _finding(
        1,
        "Instruction-tuned bases merge better",
        "Experts made from an instruction-tuned base merge better than those made from a "
        "pretrained one, at every size, by every method and for every number of experts.",
        "held-in performance, instruction-tuned less pretrained",
        _mean(difference, (1, 2, 3)),
        f"Merges keep {instruct:.2f} of their experts' performance on an instruction-tuned base "
        f"and {pretrained:.2f} on a pretrained one; the instruction-tuned is ahead in "
        f"{int((difference[0] > 0).sum())} of {difference[0].size} settings.",
    )


def _larger(grid: _Grid) -> Finding:
    statistic, sentence = None, ""
    if len(grid.sizes) > 1:
        slopes = _slope(grid.held_in, 1, grid.tripled)
        statistic = _mean(slopes, (1, 2, 3))
        first, last = (_mean(grid.held_in[:1, i], (1, 2, 3))[0] for i in (0, -1))
        rising, all_of = int((slopes[0] > 0).sum()), slopes[0].size
        sentence = (
            f"Held-in performance goes from {first:.2f} at {grid.sizes[0]} to {last:.2f} at "
            f"{grid.sizes[-1]}; it rises with size in {rising} of {all_of} settings."
        )
    return _finding(
        2,
        "Larger models merge better",
        "The larger the models, the more of their experts' performance a merge keeps.",
        "held-in performance gained by three times the parameters",
        statistic,
        sentence,
    )


def _generalisation(grid: _Grid) -> Finding:
    instruct, pretrained = grid.by_base(grid.held_out)
    above, all_of = int((grid.held_out[0] > 1).sum()), grid.held_out[0].size
    sentence = (
        f"Merges score {instruct:.3f} of an instruction-tuned base on tasks nobody was trained "
        f"on, and {pretrained:.3f} of a pretrained one; above 1 in {above} of {all_of} settings. "
    )
    if len(grid.counts) > 1:
        number = np.array(grid.counts, float)
        slope = _mean(_slope(grid.held_out[:, :, grid.instruct], 3, number), (1, 2))
        low, high = interval(slope)
        sentence += (
            f"Each expert more adds {slope[0]:+.4f} on the instruction-tuned base "
            f"(interval {low:+.4f} to {high:+.4f}). "
        )
    merged = _mean(grid.held_out[:, -1, grid.instruct, :, -1], (1,))
    ahead = merged - grid.multitask_out[:, -1, grid.instruct, -1]
    low, high = interval(ahead)
    sentence += (
        f"At {grid.sizes[-1]} and {grid.counts[-1]} experts, merges of the instruction-tuned are "
        f"{ahead[0]:+.3f} from the multitask model (interval {low:+.3f} to {high:+.3f})."
    )
    return _finding(
        3,
        "Merging improves generalisation",
        "Merged models do better than their base on held-out tasks; with a strong base they do so "
        "the more, the more experts are merged, and large ones pass the multitask model.",
        "held-out performance above the base's",
        _mean(grid.held_out, (1, 2, 3, 4)) - 1,
        sentence,
    )


def _more_experts(grid: _Grid) -> Finding:
    statistic, sentence = None, ""
    if len(grid.sizes) > 1 and len(grid.counts) > 1:
        number = np.array(grid.counts, float)
        kept = _slope(grid.held_in, 4, number)  # [replicates, sizes, bases, methods]
        statistic = _mean(_slope(kept, 1, grid.tripled), (1, 2))
        span = number[-1] - number[0]
        first, last = (float(_mean(kept[:1, i], (1, 2))[0]) * span for i in (0, -1))
        sentence = (
            f"From {grid.counts[0]} to {grid.counts[-1]} experts, held-in performance changes by "
            f"{first:+.2f} at {grid.sizes[0]} and by {last:+.2f} at {grid.sizes[-1]}."
        )
    return _finding(
        4,
        "Larger models merge more experts",
        "The larger the models, the less is lost when more experts are merged.",
        "what three times the parameters save of the loss for each further expert",
        statistic,
        sentence,
    )


def _alike(grid: _Grid) -> Finding:
    statistic, sentence = None, ""
    of_instruct = grid.held_in[:, :, grid.instruct]
    if len(grid.sizes) > 1 and of_instruct.shape[2] > 1:
        spread = _mean(of_instruct.max(2) - of_instruct.min(2), (2,))  # [replicates, sizes]
        statistic = spread[:, 0] - spread[:, -1]
        sentence = (
            f"The best and the worst method are {spread[0, 0]:.3f} apart at {grid.sizes[0]} and "
            f"{spread[0, -1]:.3f} at {grid.sizes[-1]} (held-in, instruction-tuned base)."
        )
    return _finding(
        5,
        "Methods become alike at scale",
        "With large instruction-tuned models all merge methods do equally well.",
        "distance of best and worst method, smallest less largest size",
        statistic,
        sentence,
    )
