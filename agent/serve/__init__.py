"""What the agent answers over HTTP: health and metrics."""
