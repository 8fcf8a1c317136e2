"""DINOv2: losses, centering, the teacher's moving average, schedules and parameter groups."""
