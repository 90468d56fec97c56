"""Where events come from: manifests now, an API server next."""
