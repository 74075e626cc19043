"""`m2l ui`."""

from pathlib import Path

import click

from m2l.cli.options import DIRECTORY
from m2l.errors import ConfigError


@click.command()
@click.argument("folder", type=DIRECTORY)
@click.option("--port", type=click.IntRange(0, 65535), default=8787, show_default=True)
def ui(folder: Path, port: int) -> None:
    """A page on a folder of runs, for a browser of this machine: nothing is sent elsewhere.

    Lineage, training curves, merges side by side, examples that two models answer differently, and
    a form that writes a merge's command. Ctrl-C ends it.
    """
    if not isinstance(folder, Path) or not folder.is_dir():
        raise ConfigError(f"m2l ui: {folder}: expected a local folder of runs")
    try:
        from werkzeug.serving import make_server
    except ModuleNotFoundError as error:
        raise ConfigError("m2l ui: flask is not installed: pip install 'm2l[ui]'") from error

    import logging

    from m2l.reporting import local_page

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # It would print each request.

    try:
        server = make_server("127.0.0.1", port, local_page.application(folder.absolute()))
    except SystemExit as stop:  # How werkzeug says that the port is in use.
        raise ConfigError(f"m2l ui: port {port} is in use: name another --port") from stop
    click.echo(f"m2l: http://127.0.0.1:{server.server_port}  (Ctrl-C ends it)")
    server.serve_forever()
