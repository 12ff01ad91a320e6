"""Producers: take requests from the work queue, call providers, publish their tokens to the log."""
