"""The dashboard: pages in a browser over the runs of a folder, served by this process."""
