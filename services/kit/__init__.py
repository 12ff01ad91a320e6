"""The shell code that all services share: settings, lifecycle, broker connection, HTTP serving, telemetry, clock."""
