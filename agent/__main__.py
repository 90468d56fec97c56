"""`python -m agent` is `sliceproxy`."""

from agent.cli.main import main

main()
