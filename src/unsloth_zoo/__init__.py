"""Names that documented snippets import from here; everything lives in :mod:`unsloth`."""
