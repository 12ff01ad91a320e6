"""The pure core of billing: intake, fold, reconciliation, settlement, budgets and queries."""
