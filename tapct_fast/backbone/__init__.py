"""A trained backbone: weights, preprocessing and outputs, without training code."""
