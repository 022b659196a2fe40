"""The frame and the look that all pages share."""

from __future__ import annotations

import html
from collections.abc import Iterable
from pathlib import Path

from fastchgnet import __version__

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="generator" content="FastCHGNet">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #333;
  max-width: 64rem; margin: 2rem auto; padding: 0 1rem }}
h1 {{ font-size: 1.6rem }} h2 {{ font-size: 1.15rem; margin: 2rem 0 .5rem }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .95rem }}
th, td {{ padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #ddd }}
th:first-child, td:first-child {{ text-align: left }}
thead th {{ border-bottom: 2px solid #333 }}
img {{ max-width: 100% }}
</style>
{head}</head>
<body>
<h1>{title}</h1>
{body}
<p>FastCHGNet {version}.</p>
</body>
</html>
"""


def page(title: str, body: str, head: str = "") -> str:
    """Write a page.

    Args:
        title: as text.
        body: as HTML, below the title.
        head: as HTML: styles and scripts of this page alone.
    """
    return _PAGE.format(title=html.escape(title), body=body, head=head, version=__version__)


def is_page(path: Path) -> bool:
    """Tell whether a file is a page of ours."""
    with path.open("rb") as file:
        return file.read(len(_PAGE)).startswith(_PAGE.partition("<title>")[0].encode())


def paragraphs(sentences: Iterable[str]) -> str:
    """Write each sentence, given as text, as a paragraph."""
    return "\n".join(f"<p>{html.escape(sentence)}</p>" for sentence in sentences)
