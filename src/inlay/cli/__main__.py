"""`python -m inlay.cli`, the same as `inlay`."""

from inlay.cli.app import main

main()
