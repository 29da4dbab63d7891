"""Pure functions and frozen records on tensors: targets, masks, granularity, selection, schedules."""
