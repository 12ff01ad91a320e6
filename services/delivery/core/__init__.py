"""Pure parts of delivery: no I/O, no clock."""
