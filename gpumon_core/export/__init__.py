"""The history in other programs' formats."""
