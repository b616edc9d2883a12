"""Language models: an engine in a process of its own, and OpenAI's endpoints in front of it."""
