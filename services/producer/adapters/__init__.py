"""Adapters of the producer: providers, the log, and the buckets beside it."""
