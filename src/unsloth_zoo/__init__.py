"""The second package that documented snippets import from; re-exports of :mod:`unsloth`."""

from __future__ import annotations

from unsloth.data.harmony import encode_conversations_with_harmony

__all__ = ["encode_conversations_with_harmony"]
