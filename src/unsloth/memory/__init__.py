"""What is kept, recomputed or moved between forward and backward."""
