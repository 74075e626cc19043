"""Fits the prediction of `m2l inspect --predict` to the merges of finished studies.

    python scripts/fit_retention.py RUN [RUN ...] --out m2l/studies/retention.json

RUN is the folder of a study over numbers of experts, with its checkpoints. Of the scales that
studies chose, those of the first are the default of `--predict`. --table keeps what was measured of
each merge, for one's own regressions.
"""

import argparse
from pathlib import Path

import pandas as pd

from m2l import storage
from m2l.studies import retention


def main(runs: list[str], out: str, table: str | None) -> None:
    """Fits, writes the prediction, and prints its errors on merges that were left out."""
    frames, recipes = [], {}
    for run in runs:
        frame, chosen = retention.collect(storage.path(run))
        frames.append(frame)
        for method, by_count in chosen.items():
            recipes[method] = by_count | recipes.get(method, {})
    examples = pd.concat(frames, ignore_index=True)
    if table:
        examples.to_csv(table, index=False)
    fitted = retention.fit(examples, recipes)
    fitted.write(storage.path(out))
    print(f"{len(examples)} merges of {', '.join(fitted.merges)}")
    for name, error in fitted.errors.items():
        print(
            f"left out by {name} ({error.groups}): mean absolute error {error.error:.3f}, of the "
            f"mean {error.error_of_mean:.3f}; nine of ten within {error.within:.3f}"
        )
    print(f"written: {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="The folder of a finished study.")
    parser.add_argument("--out", type=Path, required=True, help="The file to write.")
    parser.add_argument("--table", help="A csv file of what was measured.")
    main(**vars(parser.parse_args()))
