"""`python -m lab` plays the demo from a checkout."""

from agent.cli.main import main

main(["demo"])
