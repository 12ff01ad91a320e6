"""Read one connection; one module per protocol."""
