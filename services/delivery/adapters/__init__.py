"""Delivery's shells around the broker."""
