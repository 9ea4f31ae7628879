"""Tests that take minutes: `make soak`, for the night."""
