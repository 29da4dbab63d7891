"""Criterion, granularity, scope and schedule at work on a model."""
