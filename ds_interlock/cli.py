"""The console script ``ds-interlock``.

    ds-interlock plan configs/interlock.json --stages 8          predict time and memory
    ds-interlock profile configs/interlock.json --model gpt2 -o profile.json     time the layers
    ds-interlock verify configs/interlock.json --stages 4        check gradients
    ds-interlock export out/checkpoints out/model                write a model for transformers

Exit status: 0 if all is well, 1 if a check failed or could not run, 2 if the input is wrong; errors are
one message on standard error. A command imports what it needs when it runs: importing torch and
DeepSpeed takes seconds, ``--help`` should not.
"""

import argparse
import sys
from collections.abc import Sequence

from ds_interlock import __version__
from ds_interlock.commands import export, plan, profile, verify
from ds_interlock.errors import ConfigError, PeerError, PlanError, ScheduleError

FAILED, BAD_INPUT = 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs ``ds-interlock`` with ``arguments``, by default the process's own; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="ds-interlock",
        description="Interlocking backpropagation for DeepSpeed pipelines.",
        epilog="Exit status: 0 all well, 1 a check failed, 2 wrong input.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (plan, profile, verify, export):
        command.add_parser(commands)
    options = parser.parse_args(arguments)
    try:
        status: int = options.run(options)
    except (ConfigError, PlanError, PeerError, ScheduleError) as error:
        print(f"ds-interlock: {error}", file=sys.stderr)
        return BAD_INPUT if isinstance(error, ConfigError | PlanError) else FAILED
    return status


if __name__ == "__main__":
    sys.exit(main())
