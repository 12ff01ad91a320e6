"""The gRPC protocol: `tailrace/v1/tailrace.proto`, and its generated Python code."""
