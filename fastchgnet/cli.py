"""The command line: `fastchgnet COMMAND`. Every handler calls one library function."""

from __future__ import annotations

import sys

import typer

from fastchgnet.errors import InputError

app = typer.Typer(
    name="fastchgnet",
    help="Train, fine-tune and run CHGNet interatomic potentials, fast.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line; bad input ends in one line and status 2."""
    try:
        app()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
