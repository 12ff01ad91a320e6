"""Billing: settles every generation of the log against what its provider reported, and answers what was used."""
