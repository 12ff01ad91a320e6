"""Billing: counts while streams run and settles every generation against what the provider reports."""
