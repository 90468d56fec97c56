"""`python -m agent.config.document [FILE]`: makes the tables of docs/configuration.md.

Rewrites the parts of the page between `<!-- NAME: begin -->` and `<!-- NAME: end -->` from the
declarations in agent.config.settings and agent.config.kube_proxy. A test holds the page to them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from agent.config.kube_proxy import FIELDS
from agent.config.settings import OPTIONS, Declaration

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def updated(page: str) -> str:
    """The page with its generated parts as the declarations say."""
    for name, lines in (("options", _options()), ("kube-proxy", _fields())):
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        pattern = re.compile(f"(?s){re.escape(begin)}.*?{re.escape(end)}")
        table = "".join(f"{line}\n" for line in lines)
        page = pattern.sub(lambda _, text=f"{begin}{table}{end}": text, page)  # type: ignore[misc]
    return page


def _options() -> Iterator[str]:
    yield "| flag | field | default | |"
    yield "|---|---|---|---|"
    for declared in OPTIONS.values():
        yield (
            f"| `{declared.flag}` | `{declared.field}` | {declared.default_text or 'empty'} "
            f"| {_help(declared)} |"
        )


def _help(declared: Declaration) -> str:
    choices = declared.option.choices
    return declared.option.help + (f" One of {', '.join(choices)}." if choices else "")


def _fields() -> Iterator[str]:
    yield "| field | becomes | does not apply, because |"
    yield "|---|---|---|"
    for field in FIELDS:
        reason = f" {field.no_meaning}" if field.no_meaning else ""
        yield f"| `{field.path}` | {field.becomes or '-'} |{reason} |"


if __name__ == "__main__":
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE
    path.write_text(updated(path.read_text()))
