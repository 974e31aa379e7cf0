"""The subcommands of `tessera`: one file each, with `run(options, asked, environ) -> exit code`."""
