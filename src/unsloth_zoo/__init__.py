"""The second package that documented snippets import from; re-exports of :mod:`unsloth`, none so far."""
