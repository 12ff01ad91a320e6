"""Measure fan-out to many subscribers of one log: cost per event, latency, and memory per subscriber."""
