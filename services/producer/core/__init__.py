"""Pure parts of the producer: no I/O, no clock."""
