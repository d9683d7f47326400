"""What a run leaves behind: metrics log, progress, plots, one HTML page."""
