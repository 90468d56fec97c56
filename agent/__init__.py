"""The process that keeps the kernel as `rules` says it should be."""
