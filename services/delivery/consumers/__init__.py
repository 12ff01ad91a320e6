"""Provide durable consumers for services: named readers of the log whose position the broker keeps."""
