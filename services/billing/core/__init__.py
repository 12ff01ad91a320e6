"""Pure parts of billing: no I/O, no clock."""
