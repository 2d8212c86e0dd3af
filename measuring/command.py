"""What the commands of the experiments share: their parser, and how they end."""

import argparse
import sys
from collections.abc import Callable

from ds_interlock.errors import ConfigError, DataError


def command_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that shows ``description``, a module's docstring, as it is."""
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=description, formatter_class=formatter)


def exit_status(work: Callable[[], None]) -> int:
    """Does ``work``; 1 after an error that a user can meet, which is printed."""
    try:
        work()
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
