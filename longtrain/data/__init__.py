"""Documents, how they are packed into sequences, and what a model that only counts makes of them."""
