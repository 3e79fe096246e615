"""What the pages share: reading, chrome and tables."""
