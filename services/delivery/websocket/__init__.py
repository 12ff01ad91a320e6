"""Serve WebSocket connections."""
