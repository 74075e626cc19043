"""Measures the delta store: sizes, errors and CPU seconds of each form.

    python scripts/bench/deltas.py BASE EXPERT [EXPERT ...]

Prints a line for each expert and form: bytes of the expert and of the delta, their ratio, the
relative error of the task vector, and CPU seconds to make it and to restore it. Experts are also
stored as bfloat16, cast from what they are, with their base.
"""

import argparse
import tempfile
import time
from pathlib import Path

FORMS = {
    "lossless": {},
    "compeft 0.2": {"method": "compeft", "density": 0.2},
    "compeft 0.05": {"method": "compeft", "density": 0.05},
}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base")
    parser.add_argument("experts", nargs="+")
    arguments = parser.parse_args()
    from m2l import merging
    from m2l.checkpoints import opening
    from m2l.checkpoints.spans import read_whole

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)

        def cast(path: str, number: int) -> Path:
            out = root / f"bfloat16_{number}"
            merging.merge(None, [path], merging.Recipe("average", dtype="bfloat16"), out)
            return out

        for dtype in ("as stored", "bfloat16"):
            models = [arguments.base, *arguments.experts]
            if dtype == "bfloat16":
                models = [cast(path, number) for number, path in enumerate(models)]
            base, *experts = models
            for number, expert in enumerate(experts):
                for form, options in FORMS.items():
                    out = root / f"{dtype}_{number}_{form}".replace(" ", "_")
                    start = time.process_time()
                    (delta,) = merging.compress([expert], base, out, progress=False, **options)
                    middle = time.process_time()
                    for tensor in opening.open(f"{base}+{out}").parameters.values():
                        read_whole(tensor)
                    seconds = middle - start, time.process_time() - middle
                    print(f"{dtype:10} {arguments.experts[number][-40:]:40} {form:13}", end=" ")
                    print(f"{delta.nbytes['expert']:13,} {delta.nbytes['delta']:13,}", end=" ")
                    print(f"{delta.ratio:7.2f} {delta.error:6.3f}", end=" ")
                    print(f"{seconds[0]:6.1f} s {seconds[1]:6.1f} s", flush=True)
            if len(experts) > 1:
                out = root / f"{dtype}_emr"
                deltas = merging.compress(experts, base, out, method="emr", progress=False)
                shared = deltas[0].nbytes["shared"]
                size = sum(delta.nbytes["expert"] for delta in deltas)
                stored = shared + sum(delta.nbytes["delta"] for delta in deltas)
                errors = ", ".join(f"{delta.error:.3f}" for delta in deltas)
                print(
                    f"{dtype:10} emr of all {size:13,} {stored:13,} {size / stored:7.2f} {errors}"
                )


if __name__ == "__main__":
    main()
