"""Losses as pure functions of hidden states or log-probabilities."""
