"""From the store to views: which box, which view parameters, which masks; then the pixels."""
