"""The dashboard: main.py, one file a page, and ui for what they share."""
