"""The relay end to end: a provider, the pipeline, and clients that check every text."""
