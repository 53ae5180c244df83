"""The pieces of an HTML page that needs nothing but itself."""

import base64
import html
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from optaxclip.audit._text import printable


class Section(NamedTuple):
    """A part of the page with a heading of its own."""

    id: str
    title: str
    body: str  # HTML


def document(title: str, lead: str, sections: Sequence[Section], foot: str) -> str:
    """The whole page; ``lead`` and the bodies are HTML, ``title`` and ``foot`` text."""
    links = "".join(
        f'<li><a href="#{s.id}">{escape(s.title)}</a></li>' for s in sections
    )
    parts = "\n".join(
        f'<section aria-labelledby="{s.id}">\n<h2 id="{s.id}">{escape(s.title)}</h2>\n'
        f"{s.body}\n</section>"
        for s in sections
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
{lead}
</header>
<nav aria-label="Sections"><ul>{links}</ul></nav>
<main>
{parts}
</main>
<footer><p>{escape(foot)}</p></footer>
</body>
</html>
"""


def escape(text: str) -> str:
    """Plain text as HTML."""
    return html.escape(printable(text))


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{escape(text)}</p>"


def items(texts: Iterable[str]) -> str:
    """A list of plain texts."""
    return f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in texts)}</ul>"


def finding(level: str, title: str, detail: str) -> str:
    """A finding: its level is a word and a colour."""
    return (
        f'<li class="finding {level}"><h3><span class="level">{level.capitalize()}'
        f"</span> {escape(title)}</h3>{paragraph(detail)}</li>"
    )


def picture(wide: bytes, narrow: bytes, alt: str, title: str, caption: str) -> str:
    """A picture in SVG, drawn once for wide screens and paper, once for phones."""
    return (
        f"<h3>{escape(title)}</h3>\n<figure><picture>"
        f'<source media="screen and (max-width: 640px)" srcset="{_uri(narrow)}">'
        f'<img src="{_uri(wide)}" alt="{escape(alt)}"></picture>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def table(
    name: str,
    caption: str,
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    texts: Sequence[int] = (),
) -> str:
    """A table in a box that scrolls by itself; its first column heads the rows.

    Columns hold numbers and are set flush right, except the first and ``texts``. The
    caption stands outside of the box, or a phone would show the half of it.
    """
    kinds = ["text" if i in (0, *texts) else "number" for i in range(len(header))]
    columns = list(zip(kinds, header, strict=True))
    heads = "".join(f'<th scope="col" class="{k}">{escape(h)}</th>' for k, h in columns)
    body = "\n".join(f"<tr>{_cells(kinds, row)}</tr>" for row in rows)
    return (
        f'<p class="caption" id="{name}">{escape(caption)}</p>\n'
        f'<div class="scroll" role="region" tabindex="0" aria-labelledby="{name}">\n'
        f'<table aria-labelledby="{name}">\n<thead><tr>{heads}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table>\n</div>"
    )


def _cells(kinds: Sequence[str], row: Sequence[str]) -> str:
    first, *others = row
    cells = [f'<th scope="row">{escape(first)}</th>']
    for kind, cell in zip(kinds[1:], others, strict=True):
        cells.append(f'<td class="{kind}">{escape(cell)}</td>')
    return "".join(cells)


def _uri(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"


# The page may load nothing from anywhere and run nothing, whatever is in the log.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

# Text on its background has a contrast of at least 7 : 1.
STYLE = """
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1rem; max-width: 62rem; background: #fff; color: #1a1a1a;
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  overflow-wrap: anywhere;
}
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0.5rem 0; }
h2 { font-size: 1.35rem; margin: 2.2rem 0 0.6rem; border-bottom: 2px solid #d0d7de; }
h3 { font-size: 1.05rem; margin: 1.4rem 0 0.3rem; }
p { margin: 0.3rem 0 0.7rem; }
p, main li { max-width: 46rem; }
main .finding, .finding p { max-width: none; }
a { color: #0a4a82; }
code { font: 0.92em ui-monospace, Menlo, Consolas, monospace; background: #f0f2f4;
  padding: 0.05em 0.3em; border-radius: 3px; }
header ul { list-style: none; margin: 0.4rem 0; padding: 0; }
header li, footer p, figcaption, .caption { color: #444; }
nav ul { display: flex; flex-wrap: wrap; gap: 0.2rem 1.1rem; list-style: none;
  margin: 0.6rem 0; padding: 0; }
nav a { display: inline-block; padding: 0.3rem 0; }
.headline { font-size: 1.12rem; max-width: none; }
.findings { list-style: none; margin: 0; padding: 0; }
.finding { border-left: 6px solid; margin: 0.7rem 0; padding: 0.5rem 0.9rem; }
.finding h3 { margin: 0 0 0.2rem; }
.finding p { margin: 0; }
.level { display: inline-block; padding: 0 0.5em; margin-right: 0.3em; color: #fff;
  border-radius: 3px; font-size: 0.85em; }
.problem { border-color: #9a3000; background: #fdf0e9; }
.problem .level { background: #9a3000; }
.notice { border-color: #004f80; background: #eaf4fb; }
.notice .level { background: #004f80; }
.fine { border-color: #00573f; background: #e9f7f1; }
.fine .level { background: #00573f; }
figure { margin: 0.4rem 0 1.6rem; }
img { display: block; width: 100%; height: auto; }
figcaption, .caption { font-size: 0.92rem; max-width: 46rem; }
.caption { margin-top: 1.2rem; }
.scroll { overflow-x: auto; margin: 0.4rem 0 1.6rem; }
table { border-collapse: collapse; font-size: 0.95rem; overflow-wrap: normal;
  font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.7rem; border-bottom: 1px solid #d0d7de; text-align: right;
  vertical-align: top; white-space: nowrap; }
thead th { background: #f0f2f4; }
th[scope="row"] { font-weight: 600; }
.text, th[scope="row"] { text-align: left; }
.record td, .record th[scope="row"] { white-space: normal; }
.record td { overflow-wrap: anywhere; min-width: 8rem; }
footer { margin-top: 2rem; border-top: 1px solid #d0d7de; font-size: 0.92rem; }
@media (max-width: 640px) {
  body { padding: 0.75rem; }
  h1 { font-size: 1.4rem; }
  table { font-size: 0.9rem; }
  th, td { padding: 0.3rem 0.5rem; }
  th[scope="row"] { white-space: normal; }
}
@media print {
  html { font-size: 10pt; }
  body { max-width: none; padding: 0; }
  nav { display: none; }
  .scroll { overflow: visible; }
  table { font-size: 8.5pt; }
  th, td { white-space: normal; padding: 0.2rem 0.4rem; }
  thead { display: table-header-group; }
  tr, figure, .finding { break-inside: avoid; }
  h2, h3, .caption { break-after: avoid; }
  .finding, .level, thead th { print-color-adjust: exact;
    -webkit-print-color-adjust: exact; }
}
"""
