"""Merged models and adapters on the disk, proven equal to the model they were made from."""
