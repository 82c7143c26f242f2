"""From rows to batches: formats, rendering, label masks, packing, collation."""
