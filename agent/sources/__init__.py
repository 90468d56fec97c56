"""Where events come from: manifests, and the API server."""
