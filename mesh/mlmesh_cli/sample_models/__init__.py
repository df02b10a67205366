"""Models that installed packages ship, made into versions that the inference service can serve."""
