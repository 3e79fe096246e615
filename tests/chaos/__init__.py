"""A day of chaos: a recorder and a server under everything that may happen to them, and an account of every tick.

`python -m tests.chaos --help` says how to run it, CONTRIBUTING.md how to read it. Nothing in here uses gpumon's
own functions: what was recorded is judged by plain SQL and by the fake driver's log of what it answered.
"""
