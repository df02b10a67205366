"""Models made of other models: ensembles, their built-in steps, and runners that answer more than once."""
