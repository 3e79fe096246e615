"""The verbs of the command line, one module each.

A verb has a SUMMARY (one line), a docstring (its description), EXAMPLES (pairs of a command, without what begins
every one of them, and what it is for), `add`, which tells a parser its arguments, and `run`, which does it and
returns the exit status. Modules are imported when their verb is asked for, and what a verb needs besides when it
runs: `record` has to stay small.
"""
