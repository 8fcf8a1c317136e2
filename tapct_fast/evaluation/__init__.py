"""What frozen features are worth on a user's own data: heads, splits by patient, scores, tables."""
