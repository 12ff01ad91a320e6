"""Billing's shells around database and broker."""
