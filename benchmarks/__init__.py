"""One script per claim of speed, memory or precision; each measures a ratio in one run and writes a JSON."""
