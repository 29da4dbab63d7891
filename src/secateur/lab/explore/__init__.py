"""Recipes that explore one network: perturbed variants of it, searched, explained, and one of them delivered."""
