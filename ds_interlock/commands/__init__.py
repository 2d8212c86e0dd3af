"""The subcommands of ``ds-interlock``, a file each: ``add_parser`` says what it takes, ``run`` does it."""
