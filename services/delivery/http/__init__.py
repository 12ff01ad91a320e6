"""Serve the HTTP API: requests, responses and event streams."""
