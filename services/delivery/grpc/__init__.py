"""Serve the gRPC service."""
