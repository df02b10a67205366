"""Searches over hyperparameters: each trial is a job, the ledger is the only truth, Optuna proposes and prunes."""
