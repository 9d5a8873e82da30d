"""Running models on compressed parameters, without touching the models."""
