"""Alembic migrations of the training ledger; applied at every start."""
