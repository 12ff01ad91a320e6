"""A Jepsen-style checker: inject random faults into the whole system, then verify its guarantees."""
