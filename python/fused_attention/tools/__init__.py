"""The command line, and the code of its commands: verify, bench, tune and others."""
