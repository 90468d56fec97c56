"""Services and endpoints from an API server."""
