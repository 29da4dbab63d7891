"""How each kind of evidence beyond plain activations and gradients is gathered: one module for each.

The driver (`secateur.criteria.driver`) calls them; a criterion only names what it needs. A new kind is a field of
`Evidence`, a name in `Need`, a module here and its line in the driver.
"""
