"""Measures what an operator would compare: `python -m bench --help`."""
