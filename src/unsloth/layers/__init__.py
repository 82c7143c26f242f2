"""Parts that are put into a loaded model, one instance at a time."""
