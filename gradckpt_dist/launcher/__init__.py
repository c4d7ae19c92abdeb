"""Ways in from the command line: a script is run with the plugin enabled, without a change to it."""
