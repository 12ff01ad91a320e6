"""The pure part of billing: intake, fold, reconciliation, questions."""
