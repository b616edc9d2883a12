"""How processes share the work: each file builds one Lightning strategy for a world."""
