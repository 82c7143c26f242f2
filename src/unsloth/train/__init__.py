"""Training loops, on top of TRL's and transformers' trainers."""
