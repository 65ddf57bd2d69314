"""Figures of the page and of notebooks: functions from results to plotly figures."""
