"""Generation on the weights that are being trained: requests, scheduling, a paged cache, captured decoding steps."""
