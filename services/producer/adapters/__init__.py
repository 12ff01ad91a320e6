"""Adapters of the producer: providers, the log, and the key-value buckets."""
