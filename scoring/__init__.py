"""Log-probs of responses under a causal model, for the reference stage and the trainer: torch and transformers only."""
