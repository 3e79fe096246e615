"""The verbs of the command line, one module each.

A verb has a SUMMARY (one line), a docstring (its description), EXAMPLES (pairs of a command, without `gpumon
VERB`, and its purpose), `add`, which adds its arguments to a parser, and `run`, which runs it and returns the exit
status. The module of a verb is imported when the verb is used, and what the verb needs is imported when it runs:
`record` has to stay small.
"""
