"""Billing: settle every generation of the log against its provider report, and serve the usage."""
