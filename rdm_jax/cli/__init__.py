"""The command line: flags, the config flag, exit statuses."""
