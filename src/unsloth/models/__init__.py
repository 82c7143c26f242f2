"""Finding, loading and adapting models and their tokenizers."""
