"""Options: declared, read from flags and files, checked."""
