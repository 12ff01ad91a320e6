"""The producer's shells around the outside: providers and the log."""
