"""Measure the relay: a provider that stamps each token, the pipeline under test, and clients that verify every text."""
