"""The command line and the dashboard: the only place that reads arguments or draws a page."""
