"""The `unsloth` command."""
