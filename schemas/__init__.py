"""The one row every stage reads and writes, and the manifest beside it: the single source of truth."""
