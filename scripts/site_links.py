"""What the documentation's site does with links to the repository's files, which it does not have.

A hook of mkdocs (mkdocs.yml). The pages are read in a checkout as well, where such links work.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(((?:\.\./)+[^)#\s]*|report/[^)#\s]*)\)")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Writes links that lead out of docs/ as the repository's, or without one as plain text."""

    def link(match: re.Match[str]) -> str:
        text, target = match.groups()
        path = posixpath.normpath(
            posixpath.join("docs", posixpath.dirname(page.file.src_uri), target)
        )
        if files.get_file_from_path(posixpath.relpath(path, "docs")) is not None:
            return match.group()
        if not (ROOT / path).exists():
            raise PluginError(f"{page.file.src_uri}: {target}: there is no such file")
        return f"[{text}]({config.repo_url}/blob/main/{path})" if config.repo_url else text

    return _LINK.sub(link, markdown)
