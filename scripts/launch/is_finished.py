"""Says by its exit code whether the work of a command of m2l that ended with 0 is finished.

0: it is; 75: it is not, and the same command goes on; any other: that could not be found out.
`m2l train` and `m2l rounds` end with 0 also where they have saved to go on; their work is finished
if its folder, local or in a bucket, has a finished.json. Other commands are finished when they end
with 0.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import click
import tensorstore as ts


def is_finished(arguments: Sequence[str]) -> bool:
    """Returns whether a command of m2l that ended with 0 is finished.

    Args:
        arguments: Those of `m2l`, which accepted them.
    """
    name = next((argument for argument in arguments if not argument.startswith("-")), None)
    if name not in ("train", "rounds"):
        return True
    options = {"ignore_unknown_options": True, "allow_extra_args": True}
    parser = click.Command(name, params=[click.Option(["--out"])], context_settings=options)
    out = parser.make_context(name, list(arguments)).params["out"]
    if "://" not in out:
        return (Path(out) / "finished.json").exists()
    run = ts.KvStore.open(out.rstrip("/") + "/").result()
    return run.read("finished.json").result().state == "value"


if __name__ == "__main__":
    sys.exit(0 if is_finished(sys.argv[1:]) else 75)
