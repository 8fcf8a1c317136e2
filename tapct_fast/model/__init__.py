"""The 3D vision transformer and its heads."""
