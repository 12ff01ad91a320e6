"""NATS JetStream for all services: the only package that imports `nats`."""
