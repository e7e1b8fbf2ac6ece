"""``python -m multipruner report FOLDER``: a page about one or several runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .base import Parser


def make_parser() -> Parser:
    """Make the command's parser."""
    parser = Parser(
        prog="multipruner report",
        description="Write one self-contained HTML page about what runs wrote: structure, path, costs, scores, and "
        "runs side by side, with those that no other beats at what they save. Every figure also as PNG, its numbers as "
        "CSV. Loads no model.",
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="folders of finished runs or searches")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR|FILE",
        help="a folder, or FILE.html (default: report.html in the run's folder; here, when there are several runs)",
    )
    parser.add_argument(
        "--compare", action="store_true", help="set runs side by side, as several always are; one alone is an error"
    )
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    return parser


def run(arguments: Sequence[str]) -> int:
    typed = make_parser().parse_args(arguments)
    from multipruner.report.write import write_report

    target = write_report(typed.folders, typed.output, compare=typed.compare)
    print(f"report  {target}")
    print(f"files   {target.with_name(f'{target.stem}_files')}")
    return 0
