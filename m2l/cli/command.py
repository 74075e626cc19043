"""The subcommands: each is a thin function, which imports what it needs when called."""

import errno
import gc
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import click

from m2l import signals
from m2l.cli import (
    adamerging,
    align,
    checkpoints,
    compress,
    data,
    extract,
    local_ui,
    mask,
    merge,
    models,
    moe,
    rounds,
    search,
    skills,
    statistics,
    studies,
    sweep,
    verify,
)
from m2l.cli.options import GIN_BINDING, reads_gin
from m2l.errors import M2LError, Stopped, one_line
from m2l.version import __version__

# What `m2l --help` says of each command: its own help is longer than a line.
SUMMARIES = {
    "Merge": {
        "merge": "Merge experts' checkpoints into one.",
        "sweep": "Merge by many recipes; find the best on validation data.",
        "search": "Search a space of recipes by one half of the examples.",
        "adamerging": "Learn how much each expert counts from examples.",
        "mask": "Learn which entries of task vectors a merge needs.",
        "statistics": "Gather what Fisher merging and RegMean need.",
        "moe": "Make a mixture of experts of dense models.",
        "extract": "Make a low-rank adapter of a model and its base.",
        "align": "Exchange an expert's units to match another model's.",
        "compress": "Store experts as differences from their base.",
        "verify": "Prove that a merge is what its recipe makes.",
    },
    "Train and evaluate": {
        "train": "Train a model, or go on where a stopped run left off.",
        "rounds": "Train experts that are merged every so many steps.",
        "eval": "Evaluate a model by ranking and decoding.",
        "lm_eval": "Evaluate a model on lm-evaluation-harness's tasks.",
        "generate": "What a model writes; on a terminal, a chat.",
        "skills": "Add a skill to a model without losing what it has.",
        "tasks": "What there is to train on and to evaluate by.",
    },
    "Checkpoints": {
        "inspect": "What is in a checkpoint and where it came from.",
        "convert": "Hugging Face, T5X and GGUF, in and out.",
        "push": "Upload a directory to the Hugging Face Hub.",
    },
    "Studies": {
        "demo": "From nothing to a report in four minutes.",
        "study": "Run a study: bases, experts, merges, evaluations.",
        "report": "Tables, figures and the page of a study.",
    },
    "This machine": {
        "ui": "A page on a folder of runs, for a browser here.",
        "doctor": "Is this installation sound?",
    },
}


class _Commands(click.Group):
    """A group whose help lists its commands by subject, and which takes --gin.NAME=VALUE."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Returns the command and its arguments, T5X's --gin.NAME=VALUE as an option and its value.

        Raises:
            UsageError: The command reads no gin settings.
        """
        name, command, arguments = super().resolve_command(ctx, args)
        # lm_eval's own command reads its arguments.
        passes_on = command and command.context_settings.get("ignore_unknown_options")
        if command is None or passes_on or ctx.resilient_parsing:
            return name, command, arguments
        end = arguments.index("--") if "--" in arguments else len(arguments)
        expanded: list[str] = []
        for argument in arguments[:end]:
            if not argument.startswith("--gin."):
                expanded.append(argument)
            elif reads_gin(command):
                expanded += [GIN_BINDING, argument.removeprefix("--gin.")]
            else:
                raise click.UsageError(self._refusal(name, command, argument))
        return name, command, expanded + arguments[end:]

    def _refusal(self, name: str | None, command: click.Command, argument: str) -> str:
        """Says that a command has no gin settings: who does, and which flags it has itself."""
        readers = ", ".join(
            each for each in sorted(self.commands) if reads_gin(self.commands[each])
        )
        setting = argument.removeprefix("--gin.").partition("=")[0]
        flag = f"--{setting.rpartition('.')[2].lower()}"
        params = command.get_params(click.Context(command))
        flags = [each.opts[-1] for each in params if isinstance(each, click.Option)]
        meant = f"did you mean {flag}? " if flag in flags else ""
        if isinstance(command, click.Group):
            flags = [f"in m2l {name} --help"]
        listed = f"its flags are {', '.join(flags)}"
        return (
            f"m2l {name} has no gin settings, and no --gin.{setting}: {meant}{listed}; those with "
            f"gin settings are {readers}"
        )

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes a section for each subject."""
        for subject, summaries in SUMMARIES.items():
            with formatter.section(subject):
                formatter.write_dl(list(summaries.items()))


@click.group(
    cls=_Commands,
    context_settings={
        "max_content_width": 100,
        "help_option_names": ["-h", "--help"],
        # `-` and `_` in flags are alike.
        "token_normalize_func": lambda name: name.replace("-", "_"),
    },
)
@click.version_option(__version__, prog_name="m2l")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """m2l (merge to learn): train experts from one base, merge them, measure what it is worth.

    Settings: --gin_file FILE (repeated), then --gin.NAME=VALUE, then the subcommand's own flags;
    the later wins. A bare word as VALUE is a string.
    """


# What only the user can fix.
_USER_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.ELOOP),
}

for _command in (
    *(merge.merge, sweep.sweep, search.search, adamerging.adamerging, mask.mask),
    *(
        statistics.statistics,
        moe.moe,
        extract.extract,
        align.align,
        compress.compress,
        verify.verify,
    ),
    *(models.train, rounds.rounds, models.evaluate, models.lm_eval),
    *(models.generate, skills.skills, data.tasks, checkpoints.inspect, checkpoints.convert),
    *(checkpoints.push, studies.demo, studies.study, studies.report, local_ui.ui),
):
    cli.add_command(_command)


@cli.command()
@click.option("--all", "unfold", is_flag=True, help="A line for each package.")
def doctor(unfold: bool) -> None:
    """Is this installation sound? Versions, devices, mixed installs, and the repair."""
    from m2l import doctor as examination

    findings = examination.report()
    click.echo(examination.render(findings, unfold))
    if not all(finding.ok for finding in findings):
        sys.exit(2)


def _prepare() -> None:
    """Silences libraries and turns JAX's compilation cache on; for the command only."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    import logging

    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.ERROR)
    logging.getLogger("jax").setLevel(logging.ERROR)
    warnings.showwarning = lambda message, *_: click.echo(
        f"m2l: warning: {one_line(str(message))}", err=True
    )
    # JAX takes half a second to import, and reads these when a command does.
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "m2l" / "jax"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")


def run(arguments: Sequence[str], *, stopped_code: int | None) -> None:
    """Runs the command; errors become one line and an exit code.

    Args:
        arguments: The command's.
        stopped_code: The exit code of work that a signal stopped; None: 128 and its number.
    """
    debug = "--debug" in arguments
    # A tenth of the start would go into looking for garbage among what imports make.
    gc.set_threshold(100_000, 50, 50)
    try:
        if arguments and not {"-h", "--help", "--version"} & set(arguments):
            _prepare()
        cli.main(list(arguments), prog_name="m2l", standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help())
        sys.exit(2)
    except click.ClickException as error:
        message = one_line(error.format_message().replace("\n", " "))
        name = error.ctx.command.name if isinstance(error, click.UsageError) and error.ctx else ""
        if name in ("merge", "sweep") and "unexpected extra argument" in message:
            message += f": m2l {name} --base BASE --expert ONE --expert TWO names the models"
        _fail(message)
    except Stopped as stop:
        click.echo(f"m2l: {stop}", err=True)
        number = signals.requested() or signal.SIGTERM
        sys.exit(128 + number if stopped_code is None else stopped_code)
    except M2LError as error:
        if debug:
            raise
        _fail(error.render())
    except OSError as error:
        if debug or error.errno not in _USER_ERRORS:
            raise
        path = one_line(str(error.filename or "the output"))
        reason = (error.strerror or str(error)).lower()
        _fail(f"{path}: {reason}; correct that, and run this again")
    except ModuleNotFoundError as error:
        if debug or error.name != "t5":
            raise
        _fail("t5 is not installed: pip install --no-deps t5==0.9.4 (m2l doctor says why so)")


def _fail(message: str) -> None:
    click.echo(f"m2l: {message}", err=True)
    sys.exit(2)
