"""Worlds of network namespaces, and the demo that is played in one. Not part of the image."""
