"""HTTP: requests, responses and event streams."""
