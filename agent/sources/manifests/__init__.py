"""Services and endpoints from files."""
