"""Pure functions from messages to what a terminal shows. Nothing here calls, waits or reads the clock."""
