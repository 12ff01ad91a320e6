"""Tailrace's services."""
