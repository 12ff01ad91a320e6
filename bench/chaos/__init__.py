"""A checker in the manner of Jepsen: random faults on the whole system, then proof that nothing promised was broken."""
