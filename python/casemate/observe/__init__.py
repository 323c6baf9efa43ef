"""Spans and timings of what casemate does."""
