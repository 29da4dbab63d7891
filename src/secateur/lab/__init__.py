"""The lab: recipes, runs and their stages, training, data, models, evaluation, reports."""
