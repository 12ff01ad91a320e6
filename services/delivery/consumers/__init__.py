"""Durable consumers: named readers of the log whose position the broker keeps, for services rather than browsers."""
