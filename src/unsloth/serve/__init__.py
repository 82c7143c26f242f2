"""A server with the OpenAI interface on the engine of :mod:`unsloth.generate`."""
