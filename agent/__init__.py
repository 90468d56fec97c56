"""The process that keeps the kernel as `rules` says it should be."""

# pyproject.toml takes it from here: asking the installed package for it costs a start 5 ms
__version__ = "0.2.0"
