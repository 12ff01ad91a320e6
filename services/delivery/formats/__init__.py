"""How events are encoded for clients: no input or output, no clock."""
